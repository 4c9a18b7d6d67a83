"""Turns rows into shards, and counts what is left out and why."""

import datetime
import decimal
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.config import ShardConfig, least_of, suggest
from largebatch.curate.rows import Input, read_rows
from largebatch.data.tables import Row
from largebatch.errors import UserError
from largebatch.shards.fields import NEGATIVES, NONE, SCORES, FieldNames, field_names
from largebatch.shards.grades import KEPT_ASIDE, same_value
from largebatch.shards.ids import IdCounter, RepeatedIds
from largebatch.shards.index import INDEX_NAME, ShardIndex
from largebatch.shards.records import BLANKS, Record, is_blank, record_from_mapping, texts_of
from largebatch.shards.write import ShardWriter, UnfitRecordError

# Reasons for leaving a row out, as they stand in index.json.
EMPTY, TOO_SHORT, TOO_LONG, DUPLICATE, NO_POSITIVE = REASONS = (
    "empty",
    "too_short",
    "too_long",
    "duplicate",
    "no_positive",
)

# Names that a reader of our shards would take for a part of the pair.
_RESERVED = re.compile(rf"query|document|source|id|scores|(?:{'|'.join(NEGATIVES)})(?:_\d+)?")


# A character that is a word by itself (Chinese, Japanese), or a run of others without white space.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\s{_IDEOGRAPH}]+")


class Counts(NamedTuple):
    """What a conversion did."""

    rows: int
    """Rows that were read."""
    written: int
    """Records that were written."""
    dropped: dict[str, int]
    """Rows that were left out, by reason: all of `REASONS`."""
    ignored_positives: int
    """Further positives of written records, blank ones aside; only the first is the document."""
    num_shards: int
    """Tar files."""
    num_bytes: int
    """Their size."""
    repeated_ids: RepeatedIds
    """Ids that several of the written records carry."""
    unread_columns: tuple[str, ...]
    """Columns of inputs, with their types, that JSON has no values for: they are not kept."""


def convert(
    config: ShardConfig,
    inputs: Sequence[Input],
    *,
    on_bytes: Callable[[int], object],
    on_row: Callable[[], object],
) -> Counts:
    """Write the rows of `inputs` as shards with an index into `config.output_dir`.

    Fields of a row that are no part of the pair are kept beside it, under their own names, or
    under `input_NAME` where a reader of the shards would take them for a part of the pair.
    Duplicates are told by a 16-byte hash of query and document: about 100 bytes of memory a pair;
    ids that repeat by a hash of 8 bytes. A record without a source is of its input's, and one
    without an id gets that name and the number of the row among those of all inputs.
    `on_bytes` is as in `read_rows`; `on_row` is called for each row.

    Raises UserError if shards are there already (without `config.overwrite`), for a row that
    cannot be read, holds no pair or says that it is no positive one, or if no row is left. The
    folder then holds what it held.
    """
    folder = Path(config.output_dir)
    if (folder / INDEX_NAME).exists() and not config.overwrite:
        raise UserError(
            f"output_dir={folder} holds shards already; set overwrite=true to replace them, or "
            "choose another folder"
        )
    # Where the user says which rows are positives, what is left is.
    fields = {**config.fields, "grade": NONE} if config.positives else config.fields
    ids = IdCounter()
    seen: set[bytes] = set()
    # Each once, in order, whichever files it is in.
    unread: dict[str, None] = {}
    rows = ignored_positives = 0
    with ShardWriter(
        folder,
        records_per_shard=config.records_per_shard,
        layout=config.layout,
        texts=config.texts,
    ) as writer:
        for source in inputs:
            default_source = config.source or source.name
            needed = partial(_needed_among, fields=fields, where=source.path, texts=config.texts)
            for row in read_rows(
                source,
                split=config.split,
                on_bytes=on_bytes,
                needed=needed,
                on_unread=lambda column: unread.setdefault(column),
            ):
                rows += 1
                on_row()
                if not _is_positive(row, config.positives):
                    writer.dropped[NO_POSITIVE] += 1
                    continue
                record = record_from_mapping(
                    row.fields,
                    fields=fields,
                    source=config.source,
                    default_id=f"{default_source}-{rows}",
                    where=row.where,
                    texts=config.texts,
                )
                names = field_names(row.fields, fields=fields, where=row.where, texts=config.texts)
                kept_source = record.source or default_source
                uses_source = record.source != config.source
                extra = extra_fields(row, names, record, uses_source=uses_source)
                for piece in pieces_of(record, config.piece_words) if config.texts else [record]:
                    if reason := _reason_to_drop(piece, config, seen):
                        writer.dropped[reason] += 1
                        continue
                    positives = texts_of(
                        row.fields[names.document], field=names.document, where=row.where
                    )
                    ignored_positives += sum(not is_blank(text) for text in positives) - 1
                    try:
                        writer.write(piece._replace(source=kept_source), extra)
                    except UnfitRecordError as error:  # other records may have its id too
                        raise UserError(f"{row.where}: {error}") from None
                    ids.add(piece.id)
        dropped = {reason: writer.dropped[reason] for reason in REASONS}
        if not writer.num_records:
            raise UserError(
                f"nothing is left to write of {rows} rows of {', '.join(config.input)}"
                + "".join(f", {reason} {number}" for reason, number in dropped.items() if number)
            )
    index = ShardIndex.load(folder)
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    return Counts(
        rows=rows,
        written=index.num_records,
        dropped=dropped,
        ignored_positives=ignored_positives,
        num_shards=len(index.shards),
        num_bytes=num_bytes,
        repeated_ids=ids.repeated(),
        unread_columns=tuple(unread),
    )


def pieces_of(record: Record, piece_words: int) -> list[Record]:
    """Cut a text at its white space into pieces of up to so many words (0: not at all).

    All have about as many words. A Chinese or Japanese character counts as a word. Pieces are told
    apart by a number behind the id.

    >>> [piece.document for piece in pieces_of(Record("", "a b  c d e", [], "s", "1"), 2)]
    ['a', 'b  c', 'd e']
    """
    words = list(_WORD.finditer(record.document)) if piece_words else []
    count = -(-len(words) // piece_words) if words else 1
    if count == 1:
        return [record]
    ends = [len(words) * number // count for number in range(count + 1)]
    return [
        record._replace(
            document=record.document[words[begin].start() : words[end - 1].end()],
            id=f"{record.id}#{number}",
        )
        for number, (begin, end) in enumerate(pairwise(ends), start=1)
    ]


def _needed_among(
    names: Sequence[str], *, fields: Mapping[str, str], where: str, texts: bool
) -> tuple[str, ...]:
    """Return which of an input's fields hold records' texts, and their grades and numbers."""
    found = field_names(dict.fromkeys(names), fields=fields, where=where, texts=texts)
    query = () if found.query is None else (found.query,)
    label = () if found.label is None else (found.label,)
    scores = found.scores if SCORES in fields else ()
    return (*query, found.document, *found.negatives, *found.grades, *label, *scores)


def _is_positive(row: Row, positives: Mapping[str, str]) -> bool:
    """Whether all that `config.positives` says of a row's fields holds."""
    for name, wanted in positives.items():
        if name not in row.fields:
            raise UserError(
                f"{row.where}: positives.{name} names no field of it"
                f"{suggest(name, row.fields)}; it has {', '.join(map(repr, row.fields))}"
            )
        value = row.fields[name]
        least = least_of(wanted)
        if least is None:
            if not same_value(value, wanted):
                return False
            continue
        try:
            number = math.nan if value in (None, "") else float(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{row.where}: field {name!r} is {value!r} and no number, which "
                f"positives.{name}={wanted!r} needs"
            ) from None
        if not number >= least:
            return False
    return True


def _reason_to_drop(record: Record, config: ShardConfig, seen: set[bytes]) -> str | None:
    query, document = record.query, record.document
    shortest = len(document.strip(BLANKS))
    if not config.texts:
        shortest = min(shortest, len(query.strip(BLANKS)))
    if shortest == 0:
        return EMPTY
    if shortest < config.min_chars:
        return TOO_SHORT
    if max(map(len, (query, document, *record.negatives))) > config.max_chars:
        return TOO_LONG
    if config.deduplicate:
        # The length keeps ("a", "bc") and ("ab", "c") apart.
        pair = f"{len(query)} {query}{document}".encode()
        digest = hashlib.blake2b(pair, digest_size=16).digest()
        if digest in seen:
            return DUPLICATE
        seen.add(digest)
    return None


def extra_fields(
    row: Row, names: FieldNames, record: Record, *, uses_source: bool
) -> dict[str, Any]:
    """Return what a row holds beyond its record, under the names it is kept by."""
    used = {names.query, names.document, names.id, *names.negatives}
    if record.scores is not None:
        used |= {*names.scores, names.score_list}
    if record.label is not None:
        used.add(names.label)
    if uses_source:
        used.add("source")
    kept = {}
    for name, value in row.fields.items():
        if name not in used:
            # A grade that was not to be looked at is none to who reads the shards.
            is_other = name in names.other_grades or _RESERVED.fullmatch(name)
            kept[f"{KEPT_ASIDE}{name}" if is_other else name] = _plain(value, name, row.where)
    return kept


def _plain(value: Any, field: str, where: str) -> Any:
    """Turn a value into what JSON has; not-a-number and infinity become null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item, field, where) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, field, where) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise UserError(
        f"{where}: field {field!r} holds a value of type {type(value).__name__}, which does not "
        "fit into JSON; remove the field"
    )
