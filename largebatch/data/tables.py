"""Reads the files that people have, row by row: jsonl, json, csv, tsv, parquet; and lines of text.

- `.jsonl` (`.ndjson`, `.jsonlines`): an object a line. `.json`: the same, or one array of objects.
- `.csv`: RFC 4180. Quotes enclose a field that holds separators, line ends or doubled quotes. The
  separator is a comma, or a semicolon or tab if the first line has no comma, as spreadsheets write
  it. What is not well formed is refused.
- `.tsv`: tabs and line ends separate, always, and all else is text, quotes too, as in MS MARCO. A
  file whose quotes enclose fields is told by its first line or by doubled quotes, and refused: it
  is read as a `.csv`.
- `.parquet`: columns of text, numbers, truth values, dates and times to the microsecond, and lists
  and structures of these. Others are not read at all.

The first line of a csv or tsv file names the fields. Empty lines are no rows, and a byte order mark
is no text. All but parquet may be compressed as `.gz` or `.zst`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from largebatch.errors import UserError
from largebatch.shards.tar import MAX_MEMBER_BYTES

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
KNOWN = (".jsonl", ".json", ".csv", ".tsv", "these with .gz or .zst", ".parquet")

OnBytes = Callable[[int], object]
NamesNeeded = Callable[[Sequence[str]], Collection[str]]
"""Given the names of all fields, those that must be texts."""
OnUnread = Callable[[str], object]

MAX_NAME_CHARS = 100
BATCH_ROWS = 1024


class Row(NamedTuple):
    """One row of an input."""

    where: str
    """File and line, for messages."""
    fields: Mapping[str, Any]
    """Its fields by name."""


def none_needed(names: Sequence[str]) -> Collection[str]:
    """Need no field in particular."""
    del names
    return ()


def ignore(value: object) -> None:
    """Do nothing with a number of bytes, or with a column that is not read."""
    del value


def split_ending(path: Path) -> tuple[str, str]:
    """Return a file's name without its endings, and the ending that says what it holds.

    >>> split_ending(Path("a/pairs.v2.JSONL.gz"))
    ('pairs.v2', '.jsonl')
    >>> split_ending(Path("a.parquet.gz"))
    ('a', '.parquet.gz')
    """
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    ending = inner.suffix.lower()
    if ending == ".parquet" and inner != path:
        ending += path.suffix.lower()
    return inner.stem, ending


def read_file(
    path: str | Path,
    *,
    on_bytes: OnBytes = ignore,
    needed: NamesNeeded = none_needed,
    on_unread: OnUnread = ignore,
) -> Iterator[Row]:
    """Yield the rows of a file of one of `KINDS`, by its ending.

    `on_bytes` is called with the bytes that were read since the last call. `needed` says which
    columns of a typed file must be texts. `on_unread` is called with the name and the type of each
    column that is left out, for it becomes no JSON.

    Raises UserError, naming file and line, or row and column, for what cannot be read.
    """
    readers = {"jsonl": json_objects, "json": _json_rows, "csv": _csv_rows, "tsv": _tsv_rows}
    kind = KINDS[split_ending(Path(path))[1]]
    if kind == "parquet":
        return _parquet_rows(str(path), on_bytes, needed, on_unread)
    return readers[kind](path, on_bytes)


def numbered_lines(path: str | Path, on_bytes: OnBytes = ignore) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file without their ends, each with its number from 1.

    The file may be compressed (.gz or .zst). Raises UserError if a line is not UTF-8, or if the
    file is damaged.
    """
    for number, line in _lines(path, on_bytes):
        yield number, line.removesuffix("\n").removesuffix("\r")


def json_objects(path: str | Path, on_bytes: OnBytes = ignore) -> Iterator[Row]:
    """Yield the objects of a jsonl file. Blank lines are passed over.

    Raises UserError if a line is no JSON object, or see `numbered_lines`.
    """
    return _objects(path, numbered_lines(path, on_bytes))


def _objects(path: str | Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _object(_decoded(line, where), where))


def _json_rows(path: str | Path, on_bytes: OnBytes) -> Iterator[Row]:
    lines = numbered_lines(path, on_bytes)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    if not line.lstrip().startswith("["):
        yield from _objects(path, chain([first], lines))
        return
    text = "\n".join([*[""] * (number - 1), line, *(line for _, line in lines)])
    items = _decoded(text, str(path))
    for place, item in enumerate(items, 1):
        where = f"{path}, item {place}"
        yield Row(where, _object(item, where))


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); it needs one object a line, or in a .json file one "
            "array of objects"
        ) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a {type(value).__name__} where an object is needed")
    return value


def _tsv_rows(path: str | Path, on_bytes: OnBytes) -> Iterator[Row]:
    header: list[str] = []
    for number, line in numbered_lines(path, on_bytes):
        values = line.split("\t")
        where = f"{path}, line {number}"
        if not line or (_is_blank_row(values) and len(header) != 1):
            continue
        if any(map(_is_enclosed, values) if header else (value[:1] == '"' for value in values)):
            raise UserError(
                f"{where} has fields that are enclosed in quotes, and in a .tsv file quotes are "
                "text; name the file .csv, where they enclose (its separator may be a tab)"
            )
        if not header:
            header = _checked_header(values, where)
            continue
        yield _named(
            header,
            values,
            where,
            "in a .tsv file tabs and line ends always separate: take them out of the texts, or, if "
            "quotes enclose them, name the file .csv",
        )
    if not header:
        raise _no_header(path)


def _named(header: Sequence[str], values: Sequence[str], where: str, cure: str) -> Row:
    if len(values) != len(header):
        raise UserError(
            f"{where} has {_fields(values)}, and the first line names {len(header)}; {cure}"
        )
    return Row(where, dict(zip(header, values, strict=True)))


def _is_blank_row(values: Sequence[str]) -> bool:
    return len(values) == 1 and not values[0].strip()


def _is_enclosed(value: str) -> bool:
    """Whether quotes enclose a field and those inside are doubled, as only csv writers write."""
    inner = value[1:-1]
    return '""' in inner and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")


def _csv_rows(path: str | Path, on_bytes: OnBytes) -> Iterator[Row]:
    # The module's own bound, 128 KiB a field, is below what a document may have.
    csv.field_size_limit(MAX_MEMBER_BYTES)
    lines = (line for _, line in _lines(path, on_bytes))
    blank = []
    first = ""
    for first in lines:
        if first.strip():
            break
        blank.append(first)
    reader = csv.reader(chain(blank, [first], lines), delimiter=_separator(first), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(
                    f"{where}: a quote is not closed until the end of the file; quotes inside a "
                    'quoted field must be doubled ("")'
                ) from None
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; put quotes around fields with "
                "separators, quotes or line breaks, and double the quotes inside"
            ) from None
        if values is None:
            break
        if not values or (_is_blank_row(values) and len(header) != 1):
            continue
        if not header:
            header = _checked_header(values, where)
            continue
        yield _named(
            header,
            values,
            where,
            "put quotes around fields with separators, quotes or line breaks",
        )
    if not header:
        raise _no_header(path)


def _separator(header: str) -> str:
    """Return what separates the fields of a csv file, by its first line."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in (",", ";", "\t") if mark in unquoted), ",")


def _checked_header(names: list[str], where: str) -> list[str]:
    if (
        len(set(names)) < len(names)
        or names[0].strip().isdigit()
        or max(map(len, names)) > MAX_NAME_CHARS
    ):
        shown = ", ".join(repr(name[:60]) for name in names[:5])
        raise UserError(
            f"{where} begins the file with {shown}, which are no field names; put a first line "
            "that names the fields, each once, such as query and document"
        )
    return names


def _no_header(path: str | Path) -> UserError:
    return UserError(f"{path} is empty; it must begin with a line of field names")


def _fields(values: Sequence[str]) -> str:
    return f"{len(values)} field{'s' if len(values) != 1 else ''}"


def _lines(path: str | Path, on_bytes: OnBytes) -> Iterator[tuple[int, str]]:
    """Yield each line with its end and its number, from 1, decoded strictly."""
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(io.BufferedReader(_CountedFile(str(path), on_bytes)))
            # Bytes are cut at \n alone; str.splitlines would cut at characters inside a text too.
            for number, line in enumerate(_decompressed(Path(path), raw, stack), 1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} "
                        "of the line); convert the file to UTF-8"
                    ) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
        except OSError as error:
            cure = "; get it again" if Path(path).suffix.lower() in COMPRESSIONS else ""
            raise UserError(f"{path} cannot be read: {error}{cure}") from None


def _decompressed(path: Path, raw: IO[bytes], stack: ExitStack) -> Iterable[bytes]:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return raw
    # Imported here: most commands never read such a file. Unlike the zstandard package's, this
    # reader tells a file that was cut off from one that ended.
    import pyarrow as pa

    stream = stack.enter_context(pa.CompressedInputStream(raw, COMPRESSIONS[suffix]))
    return stack.enter_context(io.BufferedReader(stream))


class _CountedFile(io.FileIO):
    """A file that tells how many bytes were read."""

    def __init__(self, path: str, on_bytes: OnBytes) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any, /) -> int:
        num_bytes = super().readinto(buffer)
        assert num_bytes is not None, "files on disk do not block"
        self._on_bytes(num_bytes)
        return num_bytes


def _parquet_rows(
    path: str, on_bytes: OnBytes, needed: NamesNeeded, on_unread: OnUnread
) -> Iterator[Row]:
    # Imported here: most commands never read such a file.
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = readable_columns(file.schema_arrow, path, needed, on_unread)
            share = Path(path).stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from batch_rows(batch, columns, path, number)
                number += batch.num_rows
                on_bytes(round(share * number) - round(share * (number - batch.num_rows)))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}, after row {number}, cannot be read: {reason}") from None


def batch_rows(batch: Any, columns: Sequence[str], path: str, rows_before: int) -> Iterator[Row]:
    """Yield the rows of an Arrow batch or table, of some columns only.

    Raises UserError, naming row and column, for a value that Python cannot hold.
    """
    values = [_column(batch.column(name), path, name, rows_before) for name in columns]
    for place in range(batch.num_rows):
        fields = {name: column[place] for name, column in zip(columns, values, strict=True)}
        yield Row(f"{path}, row {rows_before + place + 1}", fields)


def readable_columns(
    schema: Any, where: str, needed: NamesNeeded, on_unread: OnUnread
) -> list[str]:
    """Return the columns of an Arrow schema that become JSON as they are; see `read_file`.

    Raises UserError if a needed one is not among them, or if there are several of one name.
    """
    names = list(schema.names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} has several columns {repeated[0]!r}; rename all but one")
    columns = [field.name for field in schema if _is_plain(field.type)]
    for name in needed(names):
        if name not in columns:
            raise UserError(
                f"{where}: column {name!r} is of type {schema.field(name).type}, and must hold "
                "text (or numbers, where it grades the pairs); cast it to string"
            )
    for field in schema:
        if field.name not in columns:
            on_unread(f"{field.name} ({field.type})")
    return columns


def _is_plain(kind: Any) -> bool:
    """Whether values of an Arrow type become text, numbers and the like, and lists of these."""
    from pyarrow import types as is_a

    if is_a.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if is_a.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_is_plain(field.type) for field in kind)
    if is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    # Python's own times have no nanoseconds.
    if is_a.is_timestamp(kind) or is_a.is_time64(kind):
        return bool(kind.unit != "ns") and _is_known_zone(getattr(kind, "tz", None))
    return any(
        test(kind)
        for test in (
            is_a.is_string, is_a.is_large_string, is_a.is_string_view, is_a.is_integer,
            is_a.is_float32, is_a.is_float64, is_a.is_boolean, is_a.is_null, is_a.is_decimal,
            is_a.is_date, is_a.is_time32,
        )
    )  # fmt: skip


def _is_known_zone(name: str | None) -> bool:
    """Whether Python knows a time zone here: some machines have no list of them."""
    import pyarrow as pa

    if not name:
        return True
    try:
        pa.lib.string_to_tzinfo(name)
    except ValueError:  # Arrow's own
        return False
    return True


def _column(values: Any, path: str, name: str, rows_before: int) -> list[Any]:
    try:
        return list(values.to_pylist())
    except (ValueError, OverflowError) as error:  # Arrow's own errors and bad UTF-8 among them
        reason = " ".join(str(error).split())
        place = rows_before + 1 + _first_fault(values)
        raise UserError(
            f"{path}, row {place}: column {name!r} cannot be read: {reason}; mend the value, or "
            "leave the column out"
        ) from None


def _first_fault(values: Any) -> int:
    for place, value in enumerate(values):
        try:
            value.as_py()
        except (ValueError, OverflowError):
            return place
    return 0
