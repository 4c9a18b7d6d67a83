"""Which field of a row is what, where `fields` does not say so.

The first line whose two names are both there counts:

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

A teacher's scores are a list of numbers, the positives' first and then the negatives': `scores`
(this project, sentence-transformers), `pos_scores` with `neg_scores` (FlagEmbedding), or a list of
that length in `label`, `labels` or `score` (sentence-transformers).

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

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from largebatch.config import suggest
from largebatch.errors import DataError
from largebatch.shards.grades import is_grade

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

MAX_FIELDS = 1000

# Rows of a set have the same fields again and again, so the search is done once per set. Bounded in
# both ways, for names come from strangers.
_CACHE: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...], bool], "FieldNames"] = {}
_CACHED_SETS, _CACHED_CHARS = 1024, 4096


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


def field_names(
    mapping: Mapping[str, Any], *, fields: Mapping[str, str], where: str, texts: bool = False
) -> FieldNames:
    """Find which fields of a row hold what; arguments and errors as in `record_from_mapping`."""
    try:
        return cached_field_names(mapping, fields, texts)
    except DataError as error:
        raise DataError(f"{where}: {error}", kind=error.kind) from None


def cached_field_names(
    mapping: Mapping[str, Any], fields: Mapping[str, str], texts: bool
) -> FieldNames:
    """Do the same with errors that name no place, quickly for rows of the same fields."""
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
        raise field_error(f"it has {len(present):,} fields, and at most {MAX_FIELDS:,} are allowed")
    fields = dict(mapped)
    for role, name in fields.items():
        if (role in ("grade", "scores") and name == NONE) or (role == "label" and name == AUTO):
            continue
        if name not in present and not (role == "negatives" and _numbered(name, present)):
            raise field_error(
                f"fields.{role}={name!r} is not among its fields, {listed(present)}"
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
        raise field_error(
            f"{missing} is recognized among its fields, {listed(present)}; "
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
        raise field_error(
            f"its label could be any of its fields {listed(found)}; say which it is, as in "
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
        raise field_error(
            f"no text is recognized among its fields, {listed(present)}; say which it is, for "
            "example 'fields={document: body}'"
        )
    ids = [name for name in IDS if name in present and name != found[0]]
    return FieldNames(None, str(found[0]), (), fields.get("id", ids[0] if ids else None))


def _numbered(name: str, present: Sequence[str]) -> list[str]:
    pattern = re.compile(re.escape(name) + r"_(\d+)")
    matches = [match for other in present if (match := pattern.fullmatch(other))]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def is_numbered(name: str) -> bool:
    """Whether it is one of several fields with a text each, so that null is a text left out."""
    return re.search(r"_\d+$", name) is not None


def field_error(message: str) -> DataError:
    """Return the error of a row whose fields are not what they must be."""
    return DataError(message, kind="field")


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Return names for a message."""
    if not names:
        return "of which it has none"
    first = [repr(name if len(name) <= 60 else f"{name[:60]}...") for name in list(names)[:20]]
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(first) + more
