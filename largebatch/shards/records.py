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
| `sentence1` | `sentence2`         | sentence-transformers                            |

Negatives are `negatives`, `negative`, `neg`, `negative_passages` and `neg_doc`, each also numbered
(`negative_0`, `negative_1`, ...), one text or a list. The id is `id`, `_id`, `query_id`,
`query-id` or `question_id`.

A document is a text, or an object with `text` and maybe `title`, which is put before it. Of several
positives the first that is not blank is the document; the others are left out, as blank negatives
are.

A teacher's scores are a list of numbers, the positives' first and then the negatives': `scores`
(this project, sentence-transformers), `pos_scores` with `neg_scores` (FlagEmbedding), or a list of
that length in `label`, `labels` or `score` (sentence-transformers). What is left out of the texts
is left out of the scores.

A label is the number that a pair's similarity is to follow (semantic textual similarity). It is
looked at only where `fields` names it; `auto` takes the one field that would grade the pair by its
name. A low label is no fault of a row, so nothing grades a row with a label, unless `fields.grade`
says what.

A row with a field that grades the pair (`label`, `score`, `is_duplicate`, ...; see `grades.py`) is
a record only if that field says yes, or nothing; a list of as many grades as there are positives
must say so of each. `fields` may name the one field that grades, as
`grade`; `none` says that none does, so that every row is a positive pair.

Where records are texts without queries, as their index says, the text is the field `text`,
`content`, `contents`, `document`, `passage` or `body`, the first that is there. No other field
counts but the id, and none grades.
"""

import decimal
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from largebatch.config import suggest
from largebatch.errors import DataError
from largebatch.shards.grades import is_grade, says_positive

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
TEXTS = ("text", "content", "contents", "document", "passage", "body")
NEGATIVES = ("negatives", "negative", "neg", "negative_passages", "neg_doc")
IDS = ("id", "_id", "query_id", "query-id", "question_id")

# What `fields` says of a grade, scores or a label that no field holds.
NONE = "none"
# What `fields.label` says where the field is to be found by its name.
AUTO = "auto"

SCORES, LABEL = "scores", "label"
POSITIVE_SCORES, NEGATIVE_SCORES = "pos_scores", "neg_scores"
# They may hold a teacher's scores, where they hold as many numbers as there are texts.
SCORE_LISTS = ("label", "labels", "score")
# The first of them that is there is the label, where several fields could be it.
LABELS = (LABEL, "score")
_NO_SCORES = "mend it, or set fields.scores=none if they are nothing to learn from"

# What shows nothing of itself: white space, control characters, and zero-width characters.
BLANKS = "".join(
    chr(i)
    for i in (*range(0x3001), 0xFEFF, 0xFFF9, 0xFFFA, 0xFFFB)
    if unicodedata.category(chr(i)) in ("Cc", "Cf", "Zs", "Zl", "Zp")
) + (
    # Letters and symbols by category, and empty all the same.
    "\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0"
)
_BLANK_CHARS = frozenset(BLANKS)

MAX_FIELDS = 1000

# Rows of a set have the same fields again and again, so the search is done once per set. Bounded in
# both ways, for names come from strangers.
_CACHE: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...], bool], "FieldNames"] = {}
_CACHED_SETS, _CACHED_CHARS = 1024, 4096


class Record(NamedTuple):
    """One training pair, or one text."""

    query: str
    """The query, without a prompt; empty for a text that has none."""
    document: str
    """The document that answers it, without a prompt; or the text."""
    negatives: list[str]
    """Documents that don't answer it; often none."""
    source: str
    """Name of the set that it is from."""
    id: str
    """What it is called. It may repeat within a source; a record's place does not."""
    scores: list[float] | None = None
    """A teacher's score of the document, and then of each negative; None: there is none."""
    label: float | None = None
    """What the similarity of query and document is to follow; None: nobody says."""


class FieldNames(NamedTuple):
    """Which fields of a row hold what."""

    query: str | None
    """Field of the query; None: records are texts without one."""
    document: str
    """Field of the document."""
    negatives: tuple[str, ...]
    """Fields of the negatives, in order."""
    id: str | None
    """Field of the id, where there is one."""
    grades: tuple[str, ...] = ()
    """Fields that may say that the pair is no positive one."""
    other_grades: tuple[str, ...] = ()
    """Fields that would be among them by their names, and are not looked at."""
    scores: tuple[str, ...] = ()
    """The field of a teacher's scores, or those of the positives' and of the negatives'."""
    score_list: str | None = None
    """Field that holds the scores if it holds as many numbers as there are texts."""
    label: str | None = None
    """Field of the label."""


def record_from_mapping(
    mapping: Mapping[str, Any],
    *,
    fields: Mapping[str, str],
    source: str,
    default_id: str,
    where: str,
    texts: bool = False,
) -> Record:
    """Turn a decoded row into a record.

    `fields` names the row's own fields for any of query, document, negatives, id, scores, label
    and grade; the others are recognized (see the top of this file). An empty `source` leaves the
    row's own `source`, where it has one. `default_id` is the id of a row without one. `where`
    begins the message of an error: file and line, or shard and member. A text that is null becomes
    empty. `texts` is whether rows are texts without queries.

    Raises DataError if a field that `fields` names is absent, if no query or document is
    recognized, if a text is no text, a score or label no finite number, if there are not as many
    scores as texts, or if a grade says that the pair is no positive one.

    >>> record_from_mapping(
    ...     {"anchor": "a", "positive": "b", "negative_1": "c"},
    ...     fields={}, source="s", default_id="7", where="pairs.jsonl, line 8",
    ... )
    Record(query='a', document='b', negatives=['c'], source='s', id='7', scores=None, label=None)
    """
    try:
        record = make_record(
            mapping, fields=fields, source=source, default_id=default_id, texts=texts
        )
        _check_unicode(record, _cached_field_names(mapping, fields, texts))
    except DataError as error:
        raise DataError(f"{where}: {error}", kind=error.kind) from None
    return record


def make_record(
    mapping: Mapping[str, Any],
    *,
    fields: Mapping[str, str],
    source: str,
    default_id: str,
    texts: bool = False,
) -> Record:
    """Do the same for texts that are known to be valid Unicode, with errors that name no place."""
    names = _cached_field_names(mapping, fields, texts)
    query = "" if names.query is None else mapping[names.query]
    document = mapping[names.document]
    for name in names.grades:
        grade = mapping[name]
        # A grade for each of the documents; lists of other lengths grade something else.
        is_of_each = isinstance(grade, list) and len(grade) == _num_items(document)
        if not all(says_positive(name, one) for one in (grade if is_of_each else [grade])):
            raise _graded(name, grade)
    if query is None:
        query = ""
    elif not isinstance(query, str):
        raise _not_text(query, str(names.query))
    documents, place = [document], 0
    if not isinstance(document, str):
        documents = _texts(document, names.document)
        place = next((i for i, text in enumerate(documents) if not is_blank(text)), -1)
        document = "" if place < 0 else documents[place]
    negatives: list[str] = []
    for name in names.negatives:
        negatives += _texts(mapping[name], name) or [""] * _is_numbered(name)
    scores = None
    if names.scores or names.score_list:
        scores = _scores(mapping, names, documents, negatives, place, is_named="scores" in fields)
    negatives = [text for text in negatives if not is_blank(text)]
    if not source:
        own_source = mapping.get("source")
        source = own_source if isinstance(own_source, str) else ""
    record_id = default_id if names.id is None else _id(mapping[names.id], names.id, default_id)
    label = None if names.label is None else _number(mapping[names.label], names.label)
    return Record(query, document, negatives, source, record_id, scores, label)


def field_names(
    mapping: Mapping[str, Any], *, fields: Mapping[str, str], where: str, texts: bool = False
) -> FieldNames:
    """Find which fields of a row hold what; arguments and errors as in `record_from_mapping`."""
    try:
        return _cached_field_names(mapping, fields, texts)
    except DataError as error:
        raise DataError(f"{where}: {error}", kind=error.kind) from None


def texts_of(value: Any, *, field: str, where: str) -> list[str]:
    """Return the texts in a field: a text, an object with `text` and maybe `title`, or a list.

    Raises DataError if it is something else; also for a reference by id to a corpus elsewhere.
    """
    try:
        return _texts(value, field)
    except DataError as error:
        raise DataError(f"{where}: {error}", kind=error.kind) from None


def is_blank(text: str) -> bool:
    r"""Whether a text holds nothing that shows.

    >>> [is_blank(text) for text in ("", " \n", "\u00a0", "\u200b \ufeff", "a")]
    [True, True, True, True, False]
    """
    return not text or (text[0] in _BLANK_CHARS and not text.strip(BLANKS))


def _texts(value: Any, field: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = _rows(value)
    elif not isinstance(value, Sequence) or isinstance(value, bytes):
        raise _not_text(value, field)
    return ["" if item is None else _text(item, field) for item in value]


def _scores(
    mapping: Mapping[str, Any],
    names: FieldNames,
    documents: Sequence[str],
    negatives: Sequence[str],
    place: int,
    *,
    is_named: bool,
) -> list[float] | None:
    """Return a teacher's scores of a document and of the negatives that are not blank.

    Args:
        mapping: The row.
        names: Which fields hold what.
        documents: All positives.
        negatives: All negatives.
        place: Which of the documents is the record's; -1: all are blank.
        is_named: Whether a user has named the field, and not only its name is that of one.
    """
    wanted = len(documents) + len(negatives)
    if names.score_list is not None:
        found = mapping[names.score_list]
        if not (isinstance(found, list) and negatives and len(found) == wanted):
            return None  # it is of something else
        values, field = found, names.score_list
    else:
        values, field = [], " and ".join(names.scores)
        for name in names.scores:
            part = mapping[name]
            if part is None or (part == [] and len(names.scores) > 1):
                continue
            if not isinstance(part, list | tuple):
                if not is_named:
                    return None
                raise _field_error(
                    f"field {name!r} holds {_kind(part)}, and must hold a teacher's scores as a "
                    f"list of numbers; {_NO_SCORES}"
                )
            values += part
        if not values and wanted:
            return None
    if len(values) != wanted:
        raise _field_error(
            f"field {field!r} holds {len(values):,} scores for {len(documents)} documents and "
            f"{len(negatives)} negatives, and each needs one, the documents' first; {_NO_SCORES}"
        )
    used = [i for i, text in enumerate(negatives, start=len(documents)) if not is_blank(text)]
    scores = [_number(values[i], field) for i in [place] * (place >= 0) + used]
    if None in scores:
        raise _field_error(f"field {field!r} holds null among its scores; {_NO_SCORES}")
    return [score for score in scores if score is not None]


def _number(value: Any, field: str) -> float | None:
    """Return a finite number; None for nothing.

    A text may hold one: a csv file holds nothing else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    is_number = isinstance(value, str | int | float | decimal.Decimal)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(str(value)[:60]) if is_number else _kind(value)
        raise _field_error(f"field {field!r} holds {shown}, and must hold finite numbers")
    return number


def _is_numbered(name: str) -> bool:
    """Whether it is one of several fields with a text each, so that null is a text left out."""
    return re.search(r"_\d+$", name) is not None


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


def _cached_field_names(
    mapping: Mapping[str, Any], fields: Mapping[str, str], texts: bool
) -> FieldNames:
    key = tuple(mapping), tuple(fields.items()), texts
    if (names := _CACHE.get(key)) is None:
        names = _find_field_names(*key)
        if len(_CACHE) < _CACHED_SETS and sum(map(len, key[0])) <= _CACHED_CHARS:
            _CACHE[key] = names
    return names


def _find_field_names(
    present: tuple[str, ...], mapped: tuple[tuple[str, str], ...], texts: bool
) -> FieldNames:
    if len(present) > MAX_FIELDS:
        raise _field_error(
            f"it has {len(present):,} fields, and at most {MAX_FIELDS:,} are allowed"
        )
    fields = dict(mapped)
    for role, name in fields.items():
        if (role in ("grade", "scores") and name == NONE) or (role == "label" and name == AUTO):
            continue
        if name not in present and not (role == "negatives" and _numbered(name, present)):
            raise _field_error(
                f"fields.{role}={name!r} is not among its fields, {_listed(present)}"
                f"{suggest(name, present)}"
            )
    if texts:
        return _field_names_of_texts(present, fields)
    query, document = fields.get("query"), fields.get("document")
    free = [name for name in present if name not in (query, document)]
    for query_name, document_name in PAIRS:
        if query_name not in free and document_name not in free:
            continue
        if (query is None and query_name not in free) or (
            document is None and document_name not in free
        ):
            continue
        query, document = query or query_name, document or document_name
        break
    if query is None or document is None:
        texts_only = not mapped and any(name in present for name in TEXTS)
        has_query = query is not None or any(name in free for name, _ in PAIRS)
        has_document = document is not None or any(name in free for _, name in PAIRS)
        missing = {
            (False, False): "no query and no document",
            (False, True): "no query",
            (True, False): "no document",
            (True, True): "no query with its document",
        }[has_query, has_document]
        raise _field_error(
            f"{missing} is recognized among its fields, {_listed(present)}; "
            "say which is what, for example 'fields={query: title, document: body}'"
            + (
                "; texts without queries need texts=true in `shard` or `index`"
                if texts_only
                else ""
            )
        )
    candidates = (fields["negatives"],) if "negatives" in fields else NEGATIVES
    negatives = [
        name
        for candidate in candidates
        for name in ([candidate] if candidate in present else []) + _numbered(candidate, present)
        if name not in (query, document)
    ]
    ids = [name for name in IDS if name in present and name not in (query, document, *negatives)]
    record_id = fields.get("id", ids[0] if ids else None)
    others = [n for n in present if n not in (query, document, record_id, *negatives)]
    label = _label_among([n for n in others if n != fields.get("grade")], fields.get(LABEL))
    scores, score_list = _scores_among([n for n in others if n != label], fields)
    others = [name for name in others if name not in (label, *scores)]
    by_name = tuple(filter(is_grade, others))
    wanted = fields.get("grade")
    grades = by_name
    if wanted is not None:
        grades = () if wanted == NONE else (wanted,)
    elif LABEL in fields:
        grades = ()
    other_grades = tuple(name for name in by_name if name not in grades)
    return FieldNames(
        query,
        document,
        tuple(negatives),
        record_id,
        grades,
        other_grades,
        scores,
        score_list,
        label,
    )


def _label_among(names: Sequence[str], wanted: str | None) -> str | None:
    """Return the field of the label; None: there is none, or none is asked for."""
    if wanted != AUTO:
        return wanted
    found = [name for name in names if is_grade(name)]
    first = [name for name in LABELS if name in found]
    if len(found) > 1 and not first:
        raise _field_error(
            f"its label could be any of its fields {_listed(found)}; say which it is, as in "
            f"'fields={{label: {found[0]}}}'"
        )
    return next(iter(first + found), None)


def _scores_among(
    names: Sequence[str], fields: Mapping[str, str]
) -> tuple[tuple[str, ...], str | None]:
    """Return the fields of a teacher's scores, or the one that may hold some."""
    wanted = fields.get("scores")
    if wanted == NONE:
        return (), None
    if wanted is not None:
        return (wanted,), None
    if SCORES in names:
        return (SCORES,), None
    if POSITIVE_SCORES in names and NEGATIVE_SCORES in names:
        return (POSITIVE_SCORES, NEGATIVE_SCORES), None
    return (), next(
        (name for name in SCORE_LISTS if name in names and name != fields.get("grade")), None
    )


def _field_names_of_texts(present: tuple[str, ...], fields: Mapping[str, str]) -> FieldNames:
    found = [name for name in (fields.get("document"), *TEXTS) if name in present]
    if not found:
        raise _field_error(
            f"no text is recognized among its fields, {_listed(present)}; say which it is, for "
            "example 'fields={document: body}'"
        )
    ids = [name for name in IDS if name in present and name != found[0]]
    return FieldNames(None, str(found[0]), (), fields.get("id", ids[0] if ids else None))


def _numbered(name: str, present: Sequence[str]) -> list[str]:
    pattern = re.compile(re.escape(name) + r"_(\d+)")
    matches = [match for other in present if (match := pattern.fullmatch(other))]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def _rows(value: Mapping[str, Any]) -> Sequence[Any]:
    # Older versions of `datasets` give a list of objects as an object of lists.
    if isinstance(value.get("text"), list):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return [value]


def _text(item: Any, field: str) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise _not_text(item, field)
    if "text" not in item:
        cure = (
            "it refers to a corpus elsewhere; put the document's text in its place"
            if {"id", "docid", "_id"} & set(item)
            else "its text must be named 'text'"
        )
        raise _field_error(
            f"field {field!r} holds an object with {_listed(item)} and no text; {cure}"
        )
    text, title = item["text"] or "", item.get("title") or ""
    for part in (text, title):
        if not isinstance(part, str):
            raise _not_text(part, field)
    return f"{title} {text}" if title else text


def _check_unicode(record: Record, names: FieldNames) -> None:
    # JSON can hold half of a surrogate pair as an escape, which no tokenizer takes.
    texts = [(names.query or "", record.query), (names.document, record.document)]
    texts += [(", ".join(names.negatives), text) for text in record.negatives]
    texts.append((names.id or "id", record.id))
    for field, text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"field {field!r} is no valid Unicode: half of a surrogate pair at character "
                    f"{error.start}",
                    kind="undecodable",
                ) from None


def _id(value: Any, field: str, default_id: str) -> str:
    if isinstance(value, str):
        return value if value.strip() else default_id
    if value is None:
        return default_id
    if isinstance(value, bool) or not isinstance(value, int):
        raise _field_error(
            f"field {field!r} holds {_kind(value)}, and must hold text or an integer"
        )
    return str(value)


def _not_text(value: Any, field: str) -> DataError:
    return _field_error(f"field {field!r} holds {_kind(value)}, and must hold text")


def _graded(name: str, value: Any) -> DataError:
    shown = repr(value)
    try:
        is_scaled = float(value) % 1 != 0  # a text too: a csv file holds nothing else
    except (TypeError, ValueError):
        is_scaled = False
    wanted = "'>=NUMBER'" if is_scaled else "VALUE"
    # A name with a space or a dot can stand in braces only.
    choice = (
        f"positives.{name}={wanted}"
        if re.fullmatch(r"\w+", name)
        else (f"positives={{{name}: {wanted}}}")
    )
    cure = (
        "give each positive a row of its own"
        if isinstance(value, list)
        else f'keep the rows that are, with `largebatch shard ... "{choice}"`'
    )
    return DataError(
        f"field {name!r} grades the pair, and {shown if len(shown) <= 60 else f'{shown[:60]}...'} "
        f"does not say that it is a positive one (as 1 or true would); {cure}, or set "
        "fields.grade=none to take every row for one, or fields.label to its name if the pairs' "
        "similarity is to follow it",
        kind="graded",
    )


def _field_error(message: str) -> DataError:
    return DataError(message, kind="field")


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
    if not names:
        return "of which it has none"
    first = [repr(name if len(name) <= 60 else f"{name[:60]}...") for name in list(names)[:20]]
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(first) + more
