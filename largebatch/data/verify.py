"""Looks through whole shards: to index those that others made, and to check those that we have."""

import hashlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO

from largebatch.data.index import INDEX_NAME, Shard, ShardIndex, cut_segments
from largebatch.data.locations import is_remote
from largebatch.data.shards import find_files, read_segment
from largebatch.data.tar import MAX_MEMBER_BYTES, iter_members
from largebatch.errors import UserError

_BLOCK_BYTES = 2**20


def shard_files(urls: Sequence[str]) -> list[Path]:
    """List the tar files that `urls` name (braces and globs), in order.

    Raises UserError if there are none, or if they lie in more than one folder or on another
    machine: an index is written beside the shards.
    """
    files = dict.fromkeys(file for url in urls for file in find_files(url))
    if remote := [file for file in files if is_remote(file)]:
        raise UserError(f"{remote[0]} is remote; index a local copy and upload index.json with it")
    paths = [Path(file) for file in files]
    if not paths:
        raise UserError("no shards are given; name tar files, for example 'shards=[data/*.tar]'")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is no file; shards must name tar files")
    if len(folders := sorted({str(path.parent) for path in paths})) > 1:
        raise UserError(
            f"shards lie in {len(folders)} folders ({', '.join(folders)}), and an index is for "
            "one; index each, and name them all in data.sources.*.urls"
        )
    return paths


def build_index(paths: Sequence[Path], *, on_bytes: Callable[[int], object]) -> ShardIndex:
    """Index tar files of one folder; each is read once, from begin to end.

    `on_bytes` is called with the number of bytes that were read since the last call. Raises
    UserError if a file is no tar, or holds no samples or something that must not be in a shard.
    """
    shards = []
    for path in paths:
        shard = scan_shard(path, on_bytes=on_bytes)
        if not shard.num_records:
            raise UserError(f"{path} holds no samples; leave it out or delete it")
        shards.append(shard)
    return ShardIndex(tuple(shards))


def scan_shard(path: Path, *, on_bytes: Callable[[int], object]) -> Shard:
    """Read one tar file from begin to end and say what an index should."""
    with path.open("rb") as file:
        reader = _ForwardReader(file, on_bytes)
        samples = []
        # An IO[bytes] in all that reading a tar needs: read, seek (forward) and tell.
        members = iter_members(reader, url=str(path))  # type: ignore[arg-type]
        for _, group in groupby(members, key=lambda member: member.key):
            sample = list(group)
            samples.append((sample[0].offset, sample[-1].end))
        reader.read_rest()
    num_bytes = reader.tell()
    return Shard(
        path.name, len(samples), num_bytes, reader.sha256.hexdigest(), cut_segments(samples)
    )


def verify(
    folder: Path, *, fields: Mapping[str, str], on_bytes: Callable[[int], object]
) -> list[str]:
    """Check the shards in a folder against its index and return all that is wrong.

    Checks that each shard is there, that its size, checksum, number of records and segments are
    as indexed, that each record decodes (`fields` as in `record_from_mapping`) and has a query
    and a document, and that no tar file is there that the index doesn't list. `on_bytes` as in
    `build_index`. Raises UserError if there is no index, or if it is damaged.
    """
    index = ShardIndex.load(folder)
    problems = []
    for shard in index.shards:
        problems += _verify_shard(folder / shard.file, shard, fields=fields, on_bytes=on_bytes)
    listed = {shard.file for shard in index.shards}
    problems += [
        f"{path} is not listed in {INDEX_NAME}"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    if not index.num_records:
        problems.append(f"{folder / INDEX_NAME} lists no records")
    return problems


def _verify_shard(
    path: Path, shard: Shard, *, fields: Mapping[str, str], on_bytes: Callable[[int], object]
) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    try:
        actual = scan_shard(path, on_bytes=on_bytes)
    except UserError as error:
        return [str(error)]
    problems = [
        f"{path}: {name} is {getattr(actual, name)}, and the index says {getattr(shard, name)}"
        for name in ("num_bytes", "sha256", "num_records")
        if getattr(actual, name) != getattr(shard, name)
    ]
    if not problems and not _same_records(actual, shard):
        problems.append(f"{path}: its segments in the index do not hold all of its records")
    # Records are read by what is there, so that their faults show even where the index is wrong.
    empty: list[str] = []
    for segment in actual.segments:
        try:
            records = read_segment(str(path), segment, fields=fields, source="")
        except UserError as error:
            problems.append(str(error))
        else:
            empty += [r.id for r in records if not (r.query.strip() and r.document.strip())]
    if empty:
        problems.append(
            f"{path}: {len(empty)} records have an empty query or document (first: {empty[0]!r})"
        )
    return problems


def _same_records(actual: Shard, indexed: Shard) -> bool:
    if actual.segments == indexed.segments:
        return True
    # Another version may have cut the same records elsewhere; then all must fit end to end.
    ends = [segment.offset + segment.num_bytes for segment in indexed.segments]
    begins = [segment.offset for segment in indexed.segments]
    return (
        bool(begins)
        and begins[0] == actual.segments[0].offset
        and begins[1:] == ends[:-1]
        and ends[-1] == actual.segments[-1].offset + actual.segments[-1].num_bytes
    )


class _ForwardReader:
    """A file that is hashed while it is read from begin to end; seeking forward reads."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], object]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._position = 0
        self.sha256 = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        # Extended headers are read at once, in the size that they claim.
        if num_bytes > MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a header claims {num_bytes:,} bytes")
        data = self._file.read(num_bytes)
        self.sha256.update(data)
        self._position += len(data)
        self._on_bytes(len(data))
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.ReadError(f"a header leads back to byte {position}")
        while self._position < position and self.read(min(position - self._position, _BLOCK_BYTES)):
            pass
        return self._position

    def read_rest(self) -> None:
        while self.read(_BLOCK_BYTES):
            pass
