"""What a training record is, and how a row becomes one; fields.py says which of its fields is what.

A document is a text, or an object with `text` and maybe `title`, which is put before it. Of several
positives the first that is not blank is the document; the others are left out, as blank negatives
are. What is left out of the texts is left out of their scores.
"""

import decimal
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from largebatch.errors import DataError
from largebatch.shards.fields import (
    FieldNames,
    cached_field_names,
    field_error,
    is_numbered,
    listed,
)
from largebatch.shards.grades import says_positive

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
    and grade; the others are recognized (see fields.py). An empty `source` leaves the
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
        _check_unicode(record, cached_field_names(mapping, fields, texts))
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
    names = cached_field_names(mapping, fields, texts)
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
        negatives += _texts(mapping[name], name) or [""] * is_numbered(name)
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
                raise field_error(
                    f"field {name!r} holds {_kind(part)}, and must hold a teacher's scores as a "
                    f"list of numbers; {_NO_SCORES}"
                )
            values += part
        if not values and wanted:
            return None
    if len(values) != wanted:
        raise field_error(
            f"field {field!r} holds {len(values):,} scores for {len(documents)} documents and "
            f"{len(negatives)} negatives, and each needs one, the documents' first; {_NO_SCORES}"
        )
    used = [i for i, text in enumerate(negatives, start=len(documents)) if not is_blank(text)]
    scores = [_number(values[i], field) for i in [place] * (place >= 0) + used]
    if None in scores:
        raise field_error(f"field {field!r} holds null among its scores; {_NO_SCORES}")
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
        raise field_error(f"field {field!r} holds {shown}, and must hold finite numbers")
    return number


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


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
        raise field_error(
            f"field {field!r} holds an object with {listed(item)} and no text; {cure}"
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
        raise field_error(f"field {field!r} holds {_kind(value)}, and must hold text or an integer")
    return str(value)


def _not_text(value: Any, field: str) -> DataError:
    return field_error(f"field {field!r} holds {_kind(value)}, and must hold text")


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


def _kind(value: Any) -> str:
    return {
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        type(None): "null",
    }.get(type(value), f"a value of type {type(value).__name__}")
