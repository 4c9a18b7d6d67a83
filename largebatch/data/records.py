"""What a training record is, and how one is recognized in the fields that others use.

Which field is what, where `fields` does not say so. The first line whose two names are both there
counts:

| query       | document            | used by                                          |
|-------------|---------------------|--------------------------------------------------|
| `query`     | `document`          | this project                                     |
| `anchor`    | `positive`          | sentence-transformers                            |
| `query`     | `positive`          | sentence-transformers                            |
| `query`     | `pos`               | FlagEmbedding (a list)                           |
| `query`     | `positive_passages` | tevatron (a list of `{docid, title, text}`)      |
| `query`     | `pos_doc`           | NeMo Automodel (texts or `{text}`, or lists)     |
| `question`  | `pos_doc`           | NeMo Automodel                                   |
| `query`     | `text`              | BEIR (a query beside its document's text)        |
| `query`     | `passage`           | MS MARCO and its kin                             |
| `query`     | `answer`            | sentence-transformers' embedding-training sets   |
| `question`  | `answer`            | sentence-transformers' embedding-training sets   |
| `title`     | `abstract`          | sentence-transformers' embedding-training sets   |
| `title`     | `body`              | sentence-transformers' embedding-training sets   |
| `sentence1` | `sentence2`         | sentence-transformers, if there is no score      |

Negatives are `negatives`, `negative`, `neg`, `negative_passages` and `neg_doc`, each also numbered
(`negative_0`, `negative_1`, ...), one text or a list. The id is `id`, `_id`, `query_id`,
`query-id` or `question_id`.

A document is a text, or an object with `text` and maybe `title`, which is put before it. Of several
positives the first is the document; the others are left out.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from largebatch.config import suggest
from largebatch.errors import UserError

PAIRS = (
    ("query", "document"),
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "pos"),
    ("query", "positive_passages"),
    ("query", "pos_doc"),
    ("question", "pos_doc"),
    ("query", "text"),
    ("query", "passage"),
    ("query", "answer"),
    ("question", "answer"),
    ("title", "abstract"),
    ("title", "body"),
    ("sentence1", "sentence2"),
)
NEGATIVES = ("negatives", "negative", "neg", "negative_passages", "neg_doc")
IDS = ("id", "_id", "query_id", "query-id", "question_id")

# Pairs of sentences that come with one of these are graded: most of them are no positives.
GRADES = ("score", "label", "similarity_score")


class Record(NamedTuple):
    """One training pair."""

    query: str
    """The query, without a prompt."""
    document: str
    """The document that answers it, without a prompt."""
    negatives: list[str]
    """Documents that don't answer it; often none."""
    source: str
    """Name of the set that it is from."""
    id: str
    """Tells it from the other records of its source."""


class FieldNames(NamedTuple):
    """Which fields of a row hold what."""

    query: str
    """Field of the query."""
    document: str
    """Field of the document."""
    negatives: tuple[str, ...]
    """Fields of the negatives, in order."""
    id: str | None
    """Field of the id, where there is one."""


def record_from_mapping(
    mapping: Mapping[str, Any],
    *,
    fields: Mapping[str, str],
    source: str,
    default_id: str,
    where: str,
) -> Record:
    """Turn a decoded row into a record.

    `fields` names the row's own fields for any of query, document, negatives and id; the others
    are recognized (see the table at the top of this file). An empty `source` leaves the row's own
    `source`, where it has one. `default_id` is the id of a row without one. `where` begins the
    message of an error: file and line, or shard and member. A text that is null becomes empty.

    Raises UserError if a field that `fields` names is absent, if no query or document is
    recognized, or if a text is no text.

    >>> record_from_mapping(
    ...     {"anchor": "a", "positive": "b", "negative_1": "c"},
    ...     fields={}, source="s", default_id="7", where="pairs.jsonl, line 8",
    ... )
    Record(query='a', document='b', negatives=['c'], source='s', id='7')
    """
    names = field_names(mapping, fields=fields, where=where)
    query = mapping[names.query]
    if query is None:
        query = ""
    _check_text(query, names.query, where)
    documents = texts_of(mapping[names.document], field=names.document, where=where)
    negatives: list[str] = []
    for name in names.negatives:
        negatives += [n for n in texts_of(mapping[name], field=name, where=where) if n]
    own_source = mapping.get("source")
    return Record(
        query=query,
        document=documents[0] if documents else "",
        negatives=negatives,
        source=source or (own_source if isinstance(own_source, str) else ""),
        id=default_id if names.id is None else _id(mapping[names.id], names.id, default_id, where),
    )


def field_names(mapping: Mapping[str, Any], *, fields: Mapping[str, str], where: str) -> FieldNames:
    """Find which fields of a row hold what; arguments and errors as in `record_from_mapping`."""
    try:
        return _field_names(tuple(mapping), tuple(fields.items()))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def texts_of(value: Any, *, field: str, where: str) -> list[str]:
    """Return the texts in a field: a text, an object with `text` and maybe `title`, or a list.

    Raises UserError if it is something else; also for a reference by id to a corpus elsewhere.
    """
    if isinstance(value, str):
        _check_text(value, field, where)
        return [value]
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = _rows(value)
    elif not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UserError(f"{where}: field {field!r} holds {_kind(value)}, and must hold text")
    return [_text(item, field, where) for item in value if item is not None]


@lru_cache(maxsize=1024)
def _field_names(present: tuple[str, ...], mapped: tuple[tuple[str, str], ...]) -> FieldNames:
    # Rows of a set have the same fields again and again, so the search is done once per set.
    fields = dict(mapped)
    for role, name in fields.items():
        if name not in present and not (role == "negatives" and _numbered(name, present)):
            raise UserError(
                f"fields.{role}={name!r} is not among its fields, {_listed(present)}"
                f"{suggest(name, present)}"
            )
    query, document = fields.get("query"), fields.get("document")
    free = [name for name in present if name not in (query, document)]
    for query_name, document_name in PAIRS:
        if query_name not in free and document_name not in free:
            continue
        if (query is None and query_name not in free) or (
            document is None and document_name not in free
        ):
            continue
        if (
            (query, document) == (None, None)
            and query_name == "sentence1"
            and any(grade in present for grade in GRADES)
        ):
            raise UserError(
                f"has sentence1 and sentence2 with a grade ({_listed(present)}), so that not every "
                "row is a positive pair; keep those that are, and set "
                "'fields={query: sentence1, document: sentence2}'"
            )
        query, document = query or query_name, document or document_name
        break
    if query is None or document is None:
        has_query = query is not None or any(name in free for name, _ in PAIRS)
        has_document = document is not None or any(name in free for _, name in PAIRS)
        missing = {
            (False, False): "no query and no document",
            (False, True): "no query",
            (True, False): "no document",
            (True, True): "no query with its document",
        }[has_query, has_document]
        raise UserError(
            f"{missing} is recognized among its fields, {_listed(present)}; "
            "say which is what, for example 'fields={query: title, document: body}'"
        )
    candidates = (fields["negatives"],) if "negatives" in fields else NEGATIVES
    negatives = [
        name
        for candidate in candidates
        for name in ([candidate] if candidate in present else []) + _numbered(candidate, present)
        if name not in (query, document)
    ]
    ids = [name for name in IDS if name in present and name not in (query, document, *negatives)]
    return FieldNames(query, document, tuple(negatives), fields.get("id", ids[0] if ids else None))


def _numbered(name: str, present: Sequence[str]) -> list[str]:
    pattern = re.compile(re.escape(name) + r"_(\d+)")
    matches = [match for other in present if (match := pattern.fullmatch(other))]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def _rows(value: Mapping[str, Any]) -> Sequence[Any]:
    # Older versions of `datasets` give a list of objects as an object of lists.
    if isinstance(value.get("text"), list):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return [value]


def _text(item: Any, field: str, where: str) -> str:
    if isinstance(item, Mapping):
        if "text" not in item:
            cure = (
                "it refers to a corpus elsewhere; put the document's text in its place"
                if {"id", "docid", "_id"} & set(item)
                else "its text must be named 'text'"
            )
            raise UserError(
                f"{where}: field {field!r} holds an object with {_listed(item)} and no text; {cure}"
            )
        _check_text(text := item["text"] or "", field, where)
        _check_text(title := item.get("title") or "", field, where)
        return f"{title} {text}" if title else str(text)
    _check_text(item, field, where)
    return str(item)


def _check_text(value: Any, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {_kind(value)}, and must hold text")
    # JSON can hold half of a surrogate pair as an escape, which no tokenizer takes.
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: field {field!r} is no valid Unicode: half of a surrogate pair at "
                f"character {error.start}"
            ) from None


def _id(value: Any, field: str, default_id: str, where: str) -> str:
    if value is None:
        return default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(
            f"{where}: field {field!r} holds {_kind(value)}, and must hold text or an integer"
        )
    text = str(value)
    _check_text(text, field, where)
    return text


def _kind(value: Any) -> str:
    return {
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        type(None): "null",
    }.get(type(value), f"a value of type {type(value).__name__}")


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) if names else "of which it has none"
