"""What index.json says of the shards in a folder: records, sizes, checksums and byte ranges."""

import json
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import orjson

from largebatch.errors import UserError
from largebatch.files import written_aside
from largebatch.stores.locations import is_remote, read_bytes
from largebatch.stores.retries import DEFAULT_RETRIES, Retries

INDEX_NAME = "index.json"
MAX_SEGMENT_RECORDS = 1000
# Bounds the memory of one read where records are large. A single record may exceed it.
MAX_SEGMENT_BYTES = 32 * 2**20

_FORMAT, _VERSION = "largebatch-index", 2
# Version 1 had no crc32.
_COLUMNS = {1: 3, 2: 4}
_BLOCK_BYTES = 2**20

Int64Array = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """A run of records within a shard that is read at once."""

    offset: int
    """Byte at which its first record's header begins."""
    num_bytes: int
    """Its size; it ends where the next segment begins, or before."""
    num_records: int
    """Records in it, at most 1,000 in shards that were written here."""
    crc32: int = -1
    """Checksum of its bytes, as of `zlib.crc32`; -1 if the index is too old to have one."""


class SegmentTable(Sequence[Segment]):
    """Segments as columns of numbers: 32 bytes each, for there may be millions."""

    def __init__(self, columns: Int64Array) -> None:
        assert columns.ndim == 2
        assert len(columns) == len(Segment._fields)
        self._columns = columns

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Self:
        """Put segments into a table."""
        rows = np.array(list(segments), np.int64).reshape(-1, len(Segment._fields))
        return cls(np.ascontiguousarray(rows.T))

    @classmethod
    def concatenate(cls, tables: Sequence["SegmentTable"]) -> Self:
        """Join tables, in order."""
        return cls(np.concatenate([cls.of([])._columns, *(t._columns for t in tables)], axis=1))

    @property
    def offsets(self) -> Int64Array:
        """`[S]`, the byte at which each begins."""
        column: Int64Array = self._columns[0]
        return column

    @property
    def num_bytes(self) -> Int64Array:
        """`[S]`, the size of each."""
        column: Int64Array = self._columns[1]
        return column

    @property
    def num_records(self) -> Int64Array:
        """`[S]`, the records of each."""
        column: Int64Array = self._columns[2]
        return column

    @property
    def crc32(self) -> Int64Array:
        """`[S]`, the checksum of each, or -1."""
        column: Int64Array = self._columns[3]
        return column

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, item: int) -> Segment: ...
    @overload
    def __getitem__(self, item: slice) -> "SegmentTable": ...
    def __getitem__(self, item: int | slice) -> "Segment | SegmentTable":
        if isinstance(item, slice):
            return SegmentTable(self._columns[:, item])
        return Segment(*self._columns[:, item].tolist())

    def __iter__(self) -> Iterator[Segment]:
        return (Segment(*row) for row in self._columns.T.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentTable) and np.array_equal(self._columns, other._columns)

    def __hash__(self) -> int:
        return hash(self._columns.tobytes())

    def __repr__(self) -> str:
        return f"SegmentTable.of({list(self)})"


class Shard(NamedTuple):
    """One tar file."""

    file: str
    """Its name in the folder of the index."""
    num_records: int
    """Records in it."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file, in hexadecimal."""
    segments: SegmentTable
    """All its records, in the order of the file."""
    holds_texts: bool = False
    """Whether its records are texts without queries, and no pairs."""


def shard_to_json(shard: Shard) -> str:
    """Return a shard's entry in the index, one line."""
    entry = shard._asdict() | {"segments": [list(s) for s in shard.segments]}
    if not shard.holds_texts:
        del entry["holds_texts"]
    return json.dumps(entry)


def shard_from_json(entry: Any, *, num_columns: int = len(Segment._fields)) -> Shard:
    """Make a shard of its decoded entry; raises ValueError, KeyError or TypeError."""
    shard = Shard(
        str(entry["file"]),
        _count(entry["num_records"]),
        _count(entry["num_bytes"]),
        str(entry["sha256"]),
        _table(entry["segments"], num_columns),
        entry.get("holds_texts") is True,
    )
    _check_shard(shard)
    return shard


class ShardIndex(NamedTuple):
    """What index.json holds."""

    shards: tuple[Shard, ...]
    """The shards of the folder, in order."""
    dropped: Mapping[str, int] = MappingProxyType({})
    """How many rows were left out when the shards were written, by reason."""

    @property
    def num_records(self) -> int:
        """Records in all shards."""
        return sum(shard.num_records for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write index.json, aside first, so that no reader ever sees a part of it.

        Raises UserError if it can't be written.
        """
        with (
            written_aside(folder / INDEX_NAME) as aside,
            aside.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.write(
                f'{{"format": "{_FORMAT}", "version": {_VERSION}, '
                f'"num_records": {self.num_records},\n'
                f'"dropped": {json.dumps(dict(self.dropped))},\n"shards": [\n'
            )
            for i, shard in enumerate(self.shards):
                file.write(f"{',' * (i > 0)}{shard_to_json(shard)}\n")
            file.write("]}\n")

    @classmethod
    def load(cls, folder: str | Path, *, retries: Retries = DEFAULT_RETRIES) -> Self:
        """Read and check the index.json of a folder, which may be remote.

        Raises UserError if there is none, or if it contradicts itself.
        """
        url = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
        if not is_remote(url) and not Path(folder).is_dir():
            if Path(folder).is_file():
                raise UserError(
                    f"no shards at {folder}: it is a file, and no .tar; make shards of it with "
                    f'`largebatch shard "input=[{folder}]" output_dir=...`, and name their folder'
                )
            raise UserError(f"no shards at {folder}: there is no such folder")
        try:
            data = read_bytes(url, retries=retries)
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no {INDEX_NAME}; for tar shards that others made, write it with "
                f"`largebatch index {shlex.quote(f'shards={folder}'.rstrip('/'))}`"
            ) from None
        try:
            return cls._parse(orjson.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{url} is damaged ({detail}); write it anew with `largebatch index ... "
                "overwrite=true`"
            ) from None

    @classmethod
    def _parse(cls, content: Any) -> Self:
        if content["format"] != _FORMAT or content["version"] not in _COLUMNS:
            raise ValueError(f"it is not of format {_FORMAT!r}, version 1 to {_VERSION}")
        num_columns = _COLUMNS[content["version"]]
        entries = content["shards"]
        entries.reverse()
        shards = []
        while entries:
            # One after another, for as lists an entry takes many times the memory.
            shards.append(shard_from_json(entries.pop(), num_columns=num_columns))
        index = cls(tuple(shards), {str(k): _count(v) for k, v in content["dropped"].items()})
        if index.num_records != content["num_records"]:
            raise ValueError("num_records is not the sum over the shards")
        if len({shard.file for shard in shards}) < len(shards):
            raise ValueError("a shard is listed twice")
        return index


class RecordSpan(NamedTuple):
    """Bytes of a shard that hold whole records: a sample, or a packed member."""

    begin: int
    """Byte at which its first header begins."""
    end: int
    """Byte after it."""
    num_records: int
    """Records in it."""
    is_packed: bool
    """Whether it is a packed member, which is a segment of its own."""


def cut_segments(spans: Iterable[RecordSpan]) -> list[Segment]:
    """Cut a shard into segments, without their checksums.

    >>> cut_segments([RecordSpan(0, 1024, 1, False), RecordSpan(1024, 2048, 1, False)])
    [Segment(offset=0, num_bytes=2048, num_records=2, crc32=-1)]
    """
    segments: list[Segment] = []
    may_grow = False
    for begin, end, num_records, is_packed in spans:
        if may_grow and not is_packed:
            last = segments[-1]
            if (
                last.num_records + num_records <= MAX_SEGMENT_RECORDS
                and end - last.offset <= MAX_SEGMENT_BYTES
            ):
                segments[-1] = Segment(
                    last.offset, end - last.offset, last.num_records + num_records
                )
                continue
        segments.append(Segment(begin, end - begin, num_records))
        may_grow = not is_packed
    return segments


def with_checksums(segments: Iterable[Segment], file: IO[bytes]) -> SegmentTable:
    """Read segments from the file of their shard and put them, with checksums, into a table."""
    table = SegmentTable.of(segments)
    for i, segment in enumerate(table):
        file.seek(segment.offset)
        crc32, left = 0, segment.num_bytes
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            crc32 = zlib.crc32(block, crc32)
            left -= len(block)
        table.crc32[i] = crc32
    return table


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a count must be")
    return value


def _table(rows: Any, num_columns: int) -> SegmentTable:
    if rows == []:
        return SegmentTable.of([])
    array = np.array(rows)
    if array.dtype != np.int64 or array.ndim != 2 or array.shape[1] != num_columns:
        raise ValueError(f"a segment is not a list of {num_columns} integers")
    columns = np.full((len(Segment._fields), len(rows)), -1, np.int64)
    columns[:num_columns] = array.T
    return SegmentTable(columns)


def _check_shard(shard: Shard) -> None:
    if not shard.file or "/" in shard.file or shard.file.startswith("."):
        raise ValueError(f"{shard.file!r} is no name of a file in the folder")
    segments = shard.segments
    if not len(segments):
        if shard.num_records:
            raise ValueError(f"{shard.file} has records and no segments")
        return
    # Bounded one by one before they are added, for sums of huge numbers would wrap around.
    for column in (segments.offsets, segments.num_bytes, segments.num_records):
        if column.min() < 0 or column.max() > 2**53:
            raise ValueError(f"a segment of {shard.file} has a number out of range")
    if segments.crc32.min() < -1 or segments.crc32.max() >= 2**32:
        raise ValueError(f"a segment of {shard.file} has a crc32 out of range")
    if shard.num_records != int(segments.num_records.sum()):
        raise ValueError(f"num_records of {shard.file} is not the sum over its segments")
    ends = segments.offsets + segments.num_bytes
    if (segments.offsets[1:] < ends[:-1]).any():
        raise ValueError(f"segments of {shard.file} overlap")
    if ends[-1] > shard.num_bytes:
        raise ValueError(f"segments of {shard.file} reach beyond its end")
