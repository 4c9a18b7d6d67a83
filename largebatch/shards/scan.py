"""Looks through whole shards, to index those that others made."""

import hashlib
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, TypeVar

import orjson

from largebatch.errors import DataError, UserError
from largebatch.files import writing
from largebatch.shards.find import find_files
from largebatch.shards.index import (
    RecordSpan,
    Shard,
    ShardIndex,
    cut_segments,
    shard_from_json,
    shard_to_json,
    with_checksums,
)
from largebatch.shards.packed import unpack
from largebatch.shards.tar import MAX_MEMBER_BYTES, MAX_SAMPLE_BYTES, Member, iter_members
from largebatch.stores.locations import is_remote
from largebatch.world import num_cores

PARTIAL_NAME = "index.partial.jsonl"

_BLOCK_BYTES = 2**20
# Starting processes takes about a second, in which one reads so much.
_BYTES_PER_WORKER = 2**28

Result = TypeVar("Result")
OnBytes = Callable[[int], object]


def shard_files(urls: Sequence[str]) -> list[Path]:
    """List the tar files that `urls` name (braces, globs, or the folder that holds them), in order.

    Raises UserError if there are none, or if they lie in more than one folder or on another
    machine: an index is written beside the shards.
    """
    files = dict.fromkeys(file for url in urls for file in find_files(url))
    if remote := [file for file in files if is_remote(file)]:
        raise UserError(f"{remote[0]} is remote; index a local copy and upload index.json with it")
    if not files:
        raise UserError("no shards are given; name tar files, for example 'shards=[data/*.tar]'")
    paths: list[Path] = []
    for path in map(Path, files):
        if path.is_dir():
            if not (inside := sorted(path.glob("*.tar"))):
                raise UserError(f"no shards at {path}: the folder holds no *.tar")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"no shards at {path}: there is no such file or folder")
    paths = list(dict.fromkeys(paths))
    if len(folders := sorted({str(path.parent) for path in paths})) > 1:
        raise UserError(
            f"shards lie in {len(folders)} folders ({', '.join(folders)}), and an index is for "
            "one; index each, and name them all in data.sources.NAME.urls"
        )
    return paths


def build_index(
    paths: Sequence[Path],
    *,
    texts: bool = False,
    workers: int = 1,
    on_bytes: OnBytes,
    on_fault: Callable[[str], object],
) -> ShardIndex:
    """Index tar files of one folder, each read once from begin to end, and save the index.

    `texts` is whether the records are texts without queries. `workers` processes read (0: as many
    as pay off). What is done is kept in `index.partial.jsonl`
    until the end, so that another run goes on where this one was stopped; a file that has changed
    meanwhile is read again. `on_bytes` is called with the number of bytes that were done since the
    last call.

    Raises DataError if a file is no tar, or holds no samples or something that must not be in a
    shard. The others are read all the same; if there are several such files, `on_fault` is called
    with what is wrong with each, and then UserError is raised.
    """
    folder = paths[0].parent
    aside = _PartialIndex(folder)
    shards: dict[Path, Shard] = {}
    for path in paths:
        if (shard := aside.find(path)) is not None:
            shards[path] = shard
            on_bytes(shard.num_bytes)
    left = {path: partial(_scan_to_index, path) for path in paths if path not in shards}
    stats = {path: path.stat() for path in left}
    faults: list[DataError] = []
    for path, found in run_on_shards(left, workers=workers, on_bytes=on_bytes):
        if isinstance(found, DataError):
            faults.append(found)
        else:
            shards[path] = found
            aside.keep(found, stats[path])
    if len(faults) == 1:
        raise faults[0]
    if faults:
        for fault in faults:
            on_fault(str(fault))
        raise UserError(
            f"{len(faults)} of {len(paths)} shards can't be indexed; they are listed above: "
            "replace them or leave them out, and run this again (it goes on with what is left)"
        )
    index = ShardIndex(tuple(shards[path]._replace(holds_texts=texts) for path in paths))
    index.save(folder)
    aside.remove()
    return index


def scan_shard(path: Path, *, on_bytes: OnBytes) -> Shard:
    """Read one tar file from begin to end and say what an index should.

    Raises DataError if it is no tar, or holds something that must not be in a shard.
    """
    with path.open("rb") as file:
        reader = _ForwardReader(file, on_bytes)
        cuts = cut_segments(_spans(reader, url=str(path)))
        reader.read_rest()
        segments = with_checksums(cuts, file)
    num_records = int(segments.num_records.sum())
    return Shard(path.name, num_records, reader.tell(), reader.sha256.hexdigest(), segments)


def run_on_shards(
    tasks: Mapping[Path, Callable[[OnBytes], Result]], *, workers: int, on_bytes: OnBytes
) -> Iterator[tuple[Path, Result]]:
    """Run a task for each file, in `workers` processes, and yield what it returns.

    0 workers: as many as pay off. With more than one, results come as they are ready, and
    `on_bytes` is called here for a whole file at once.
    """
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in tasks}
    if not workers:
        workers = min(num_cores(), sum(sizes.values()) // _BYTES_PER_WORKER)
    workers = min(workers, len(tasks))
    if workers <= 1:
        for path, task in tasks.items():
            yield path, task(on_bytes)
        return
    # Spawned, not forked: the caller may hold threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(task, _ignore): path for path, task in tasks.items()}
        try:
            for future in as_completed(list(futures)):
                path = futures.pop(future)
                on_bytes(sizes[path])
                yield path, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore(num_bytes: int) -> None:
    del num_bytes


def _scan_to_index(path: Path, on_bytes: OnBytes) -> Shard | DataError:
    try:
        shard = scan_shard(path, on_bytes=on_bytes)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{path} cannot be read: {error}", kind="unreachable")
    if not shard.num_records:
        return DataError(f"{path} holds no samples; leave it out or delete it", kind="empty")
    return shard


def _spans(reader: "_ForwardReader", *, url: str) -> Iterator[RecordSpan]:
    # An IO[bytes] in all that reading a tar needs: read, seek (forward) and tell.
    members: Iterable[Member] = iter_members(reader, url=url)  # type: ignore[arg-type]
    for (_, is_packed), group in groupby(members, key=lambda m: (m.key, m.is_packed)):
        if is_packed:
            for member in group:
                where = f"{url}: member {member.name!r} at byte {member.offset}"
                lines = unpack(reader.read(member.num_bytes), where=where)
                if lines:
                    yield RecordSpan(member.offset, member.end, len(lines), is_packed=True)
        else:
            first = last = next(group)
            for last in group:
                if last.end - first.offset > MAX_SAMPLE_BYTES:
                    raise DataError(
                        f"{url}: sample {first.key[:300]!r} at byte {first.offset} takes more than "
                        f"the {MAX_SAMPLE_BYTES:,} bytes that are allowed",
                        kind="too_large",
                    )
            yield RecordSpan(first.offset, last.end, 1, is_packed=False)


class _PartialIndex:
    """Entries of an index that isn't complete yet, a line each, found by name, size and time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PARTIAL_NAME
        self._shards: dict[tuple[str, int, int], Shard] = {}
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for line in lines:
            try:
                entry = orjson.loads(line)
                shard = shard_from_json(entry["shard"])
                self._shards[shard.file, shard.num_bytes, int(entry["mtime_ns"])] = shard
            except (ValueError, KeyError, TypeError):
                continue  # The run was stopped while it wrote this line.

    def find(self, path: Path) -> Shard | None:
        stat = path.stat()
        return self._shards.get((path.name, stat.st_size, stat.st_mtime_ns))

    def keep(self, shard: Shard, stat: os.stat_result) -> None:
        if shard.num_bytes == stat.st_size:
            line = f'{{"mtime_ns": {stat.st_mtime_ns}, "shard": {shard_to_json(shard)}}}\n'
            before = self._path.stat().st_size if self._path.exists() else 0
            try:
                with writing(self._path), self._path.open("ab") as file:
                    # After a line that was cut off, this begins a new one.
                    file.write(b"\n" * (before > 0) + line.encode())
            except UserError:
                if before == 0:
                    self.remove()
                raise

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _ForwardReader:
    """A file that is hashed while it is read from begin to end; seeking forward reads."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._position = 0
        self._last = b""
        # What was read already, after a step back.
        self._again = b""
        self.sha256 = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        # Extended headers are read at once, in the size that they claim.
        if num_bytes > MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a header claims {num_bytes:,} bytes")
        again, self._again = self._again[:num_bytes], self._again[num_bytes:]
        data = self._file.read(num_bytes - len(again))
        self.sha256.update(data)
        self._on_bytes(len(data))
        self._last = again + data
        self._position += len(self._last)
        return self._last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        back = self._position - position
        if back > len(self._last):
            raise tarfile.ReadError(f"a header leads back to byte {position}")
        if back > 0:
            self._again, self._last = self._last[-back:] + self._again, b""
            self._position = position
        while self._position < position and self.read(min(position - self._position, _BLOCK_BYTES)):
            pass
        return self._position

    def read_rest(self) -> None:
        while self.read(_BLOCK_BYTES):
            pass
