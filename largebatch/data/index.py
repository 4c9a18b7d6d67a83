"""What index.json says of the shards in a folder: records, sizes, checksums and byte ranges."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from largebatch.data.locations import is_remote, read_bytes
from largebatch.errors import UserError

INDEX_NAME = "index.json"
MAX_SEGMENT_RECORDS = 1000
# Bounds the memory of one read where records are large. A single record may exceed it.
MAX_SEGMENT_BYTES = 32 * 2**20

_FORMAT, _VERSION = "largebatch-index", 1


class Segment(NamedTuple):
    """A run of records within a shard that is read at once."""

    offset: int
    """Byte at which its first record's header begins."""
    num_bytes: int
    """Its size; it ends where the next segment begins."""
    num_records: int
    """Records in it, at most 1,000."""


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
    segments: tuple[Segment, ...]
    """All its records, in the order of the file."""


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
        """Write index.json, aside first, so that no reader ever sees a part of it."""
        aside = folder / f"{INDEX_NAME}.partial"
        shards = ",\n".join(json.dumps(shard._asdict()) for shard in self.shards)
        aside.write_text(
            f'{{"format": "{_FORMAT}", "version": {_VERSION}, "num_records": {self.num_records},\n'
            f'"dropped": {json.dumps(dict(self.dropped))},\n"shards": [\n{shards}\n]}}\n',
            encoding="utf-8",
        )
        aside.replace(folder / INDEX_NAME)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check the index.json of a folder, which may be remote.

        Raises UserError if there is none, or if it contradicts itself.
        """
        url = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
        if not is_remote(url) and not Path(folder).is_dir():
            raise UserError(f"no shards at {folder}: there is no such folder")
        try:
            data = read_bytes(url)
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no {INDEX_NAME}; for tar shards that others made, write it with "
                f"`largebatch index 'shards=[{str(folder).rstrip('/')}/*.tar]'`"
            ) from None
        try:
            return cls._parse(json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{url} is damaged ({detail}); write it anew with `largebatch index ... "
                "overwrite=true`"
            ) from None

    @classmethod
    def _parse(cls, content: Any) -> Self:
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"it is not of format {_FORMAT!r}, version {_VERSION}")
        shards = []
        for entry in content["shards"]:
            segments = tuple(Segment(*map(_count, segment)) for segment in entry["segments"])
            shard = Shard(
                str(entry["file"]),
                _count(entry["num_records"]),
                _count(entry["num_bytes"]),
                str(entry["sha256"]),
                segments,
            )
            _check_shard(shard)
            shards.append(shard)
        index = cls(tuple(shards), {str(k): _count(v) for k, v in content["dropped"].items()})
        if index.num_records != content["num_records"]:
            raise ValueError("num_records is not the sum over the shards")
        if len({shard.file for shard in shards}) < len(shards):
            raise ValueError("a shard is listed twice")
        return index


def cut_segments(samples: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Cut a shard, given as the first and last byte offset of each sample, into segments.

    >>> cut_segments([(0, 1024), (1024, 2048)])
    (Segment(offset=0, num_bytes=2048, num_records=2),)
    """
    segments: list[Segment] = []
    first = 0
    for i, (_, end) in enumerate(samples):
        begin = samples[first][0]
        is_last = i + 1 == len(samples)
        if (
            is_last
            or i + 1 - first == MAX_SEGMENT_RECORDS
            or samples[i + 1][1] - begin > MAX_SEGMENT_BYTES
        ):
            segments.append(Segment(begin, end - begin, i + 1 - first))
            first = i + 1
    return tuple(segments)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a count must be")
    return value


def _check_shard(shard: Shard) -> None:
    if not shard.file or "/" in shard.file or shard.file.startswith("."):
        raise ValueError(f"{shard.file!r} is no name of a file in the folder")
    if shard.num_records != sum(segment.num_records for segment in shard.segments):
        raise ValueError(f"num_records of {shard.file} is not the sum over its segments")
    position = 0
    for segment in shard.segments:
        if segment.offset < position:
            raise ValueError(f"segments of {shard.file} overlap")
        position = segment.offset + segment.num_bytes
    if position > shard.num_bytes:
        raise ValueError(f"segments of {shard.file} reach beyond its end")
