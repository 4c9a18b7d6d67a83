"""Shards: numbered tar files of records, with an index.json that says what lies where.

A shard is a plain webdataset tar. The index cuts each into segments of up to 1,000 records, which
are read by byte range, so that any order of segments can be read from a disk or a bucket.
"""

import glob
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from braceexpand import braceexpand
from filelock import FileLock, Timeout

from largebatch.data.index import INDEX_NAME, Segment, Shard, ShardIndex, cut_segments
from largebatch.data.locations import is_remote, read_bytes
from largebatch.data.records import Record, record_from_mapping
from largebatch.data.tar import MAX_MEMBER_BYTES, iter_members, iter_samples
from largebatch.errors import UserError

__all__ = [
    "INDEX_NAME",
    "Segment",
    "Shard",
    "ShardIndex",
    "ShardWriter",
    "find_files",
    "read_segment",
    "resolve_source",
]


class ShardWriter:
    """Writes records into a folder as shards with an index; a context manager.

    The files are made aside, in `.partial/`, and take their places when the context ends without
    an error: first the shards of an index that is there go, then the new ones come, and the new
    index last. Until then, and after an error, the folder holds what it held. The same records
    give the same bytes. `dropped` counts what the caller leaves out, for the index.

    Raises UserError on entry if another process is writing to the folder, or if there are tar
    files of the same kind in it that no index lists.
    """

    def __init__(self, folder: Path, *, records_per_shard: int) -> None:
        assert records_per_shard >= 1
        self.folder = folder
        self.records_per_shard = records_per_shard
        self.dropped: Counter[str] = Counter()
        self.num_records = 0
        self._partial = folder / ".partial"
        self._replaced: list[Path] = []
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is writing to {self.folder}; wait, or choose another folder"
            ) from None
        try:
            self._replaced = self._find_replaced()
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
        except BaseException:
            self._lock.release()
            raise
        return self

    def write(self, record: Record, extra: Mapping[str, Any] | None = None) -> None:
        """Append a record; `extra` holds further fields to keep beside it.

        Raises UserError if the record is larger than a reader would take, or `extra` holds what
        JSON cannot.
        """
        if self._open is None:
            name = f"shard-{len(self._shards):06d}.tar"
            self._open = _OpenShard(self._partial / name)
        self._open.append(f"{self.num_records:09d}", _encode(record, extra or {}))
        self.num_records += 1
        if self._open.num_records == self.records_per_shard:
            self._finish_shard()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._open is not None:
                self._finish_shard()
            if error is None:
                self._put_in_place()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._lock.release()

    def _find_replaced(self) -> list[Path]:
        has_index = (self.folder / INDEX_NAME).exists()
        shards = ShardIndex.load(self.folder).shards if has_index else ()
        listed = [self.folder / shard.file for shard in shards]
        if strangers := sorted(set(self.folder.glob("shard-*.tar")) - set(listed)):
            raise UserError(
                f"{strangers[0]} is there, and no index lists it; move or delete it, or choose "
                "another folder"
            )
        return listed

    def _finish_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.finish())
        self._open = None

    def _put_in_place(self) -> None:
        for path in self._replaced:
            path.unlink(missing_ok=True)
        for shard in self._shards:
            (self._partial / shard.file).replace(self.folder / shard.file)
        ShardIndex(tuple(self._shards), dict(sorted(self.dropped.items()))).save(self.folder)


def read_segment(
    url: str, segment: Segment, *, fields: Mapping[str, str], source: str
) -> list[Record]:
    """Read the records of one segment of the shard at `url`, by byte range.

    `fields` and `source` are as in `record_from_mapping`. A record without an id gets
    `FILE:KEY`. Raises UserError, naming the shard, the member and the byte, for anything that is
    not as the index says, or that is neither UTF-8 JSON nor UTF-8 text.
    """
    end = segment.offset + segment.num_bytes
    try:
        data = read_bytes(url, segment.offset, end)
    except FileNotFoundError:
        raise UserError(f"shard {url} is missing, though the index lists it") from None
    if len(data) != segment.num_bytes:
        raise UserError(
            f"shard {url} gave {len(data):,} bytes for the {segment.num_bytes:,} from byte "
            f"{segment.offset:,} on; it is cut off, or its server does not serve byte ranges"
        )
    file = url.rpartition("/")[2]
    members = iter_members(io.BytesIO(data), url=url, base=segment.offset, end=end)
    records = [
        record_from_mapping(
            sample,
            fields=fields,
            source=source,
            default_id=f"{file}:{key}",
            where=f"{url}: sample {key!r}",
        )
        for key, sample in iter_samples(members, memoryview(data), url=url, base=segment.offset)
    ]
    if len(records) != segment.num_records:
        raise UserError(
            f"shard {url} has {len(records)} records from byte {segment.offset} on, and its index "
            f"{segment.num_records}; it has changed since it was indexed: run `largebatch index "
            "... overwrite=true`"
        )
    return records


def resolve_source(urls: Sequence[str]) -> list[tuple[str, Shard]]:
    """Find the shards of a source, in order: each one's url and its entry in the index.

    A url is a folder with an index.json, or names tar files beside one, with braces
    (`shard-{000000..000009}.tar`) or globs (remote: in the file's name only).

    Raises UserError if a url matches nothing, if a shard is missing, has another size than the
    index says, holds no records or comes twice, or if there is no index.
    """
    indices: dict[str, ShardIndex] = {}
    found: dict[str, Shard] = {}
    for url in urls:
        for folder, file in _locate(url):
            if folder not in indices:
                indices[folder] = ShardIndex.load(folder)
            shards = [
                s for s in indices[folder].shards if file is None or fnmatchcase(s.file, file)
            ]
            if not shards:
                raise UserError(
                    f"no shards at {url}: {folder}/{INDEX_NAME} lists "
                    + (f"no {file}; is it newer than the index?" if file else "none")
                )
            for shard in shards:
                path = f"{folder}/{shard.file}"
                if path in found:
                    raise UserError(f"shard {path} is named twice by {list(urls)}; name it once")
                _check_present(path, shard)
                found[path] = shard
    if not found:
        raise UserError("no shards: no urls are given; name folders with an index.json")
    return list(found.items())


def find_files(url: str) -> list[str]:
    """Expand braces, and on this machine globs, in a url; the paths that result, in order.

    Raises UserError if nothing matches a glob, or if braces do not match.
    """
    try:
        expanded = list(braceexpand(url))
    except ValueError:
        raise UserError(f"{url!r} has braces that do not match") from None
    found: list[str] = []
    for path in expanded:
        if is_remote(path) or not glob.has_magic(path) or Path(path).exists():
            found.append(path)
        elif matches := sorted(glob.glob(path)):  # noqa: PTH207
            found += matches
        else:
            raise UserError(f"no shards at {path}: nothing matches")
    return found


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, path: Path) -> None:
        # Imported here: it imports torch, which commands that only convert data can do without.
        from webdataset.writer import TarWriter

        self._path = path
        self._file = _HashingFile(path.open("wb"))
        self._tar = TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        self._samples: list[tuple[int, int]] = []

    @property
    def num_records(self) -> int:
        return len(self._samples)

    def append(self, key: str, content: bytes) -> None:
        begin: int = self._tar.tarstream.offset
        self._tar.write({"__key__": key, "json": content})
        self._samples.append((begin, self._tar.tarstream.offset))

    def finish(self) -> Shard:
        self._tar.close()
        self._file.close()
        return Shard(
            self._path.name,
            len(self._samples),
            self._path.stat().st_size,
            self._file.sha256.hexdigest(),
            cut_segments(self._samples),
        )


class _HashingFile:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def _encode(record: Record, extra: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = {"query": record.query, "document": record.document}
    if record.negatives:
        content["negatives"] = record.negatives
    content |= {"source": record.source, "id": record.id}
    if taken := (set(content) | {"negatives"}) & set(extra):
        raise UserError(
            f"record {record.id!r} has further fields named {sorted(taken)}, which are taken; "
            "rename them"
        )
    try:
        data = json.dumps(content | dict(extra), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"record {record.id!r} does not fit into JSON: {error}") from None
    if len(data) > MAX_MEMBER_BYTES:
        raise UserError(
            f"record {record.id!r} takes {len(data):,} bytes; at most {MAX_MEMBER_BYTES:,} are "
            "allowed; shorten its texts"
        )
    return data


def _locate(url: str) -> list[tuple[str, str | None]]:
    """Split a url into pairs of a folder and a pattern of files in it (None: all it lists)."""
    places: list[tuple[str, str | None]] = []
    for path in find_files(url):
        folder, _, file = path.rpartition("/")
        if not file.endswith(".tar"):
            places.append((path.rstrip("/"), None))
        elif is_remote(path):
            places.append((folder, file))
        else:
            places.append((folder or ".", glob.escape(file)))
    return places


def _check_present(path: str, shard: Shard) -> None:
    if not shard.num_records:
        raise UserError(f"shard {path} holds no records; leave it out and index the others anew")
    if is_remote(path):
        return
    if not Path(path).is_file():
        raise UserError(f"shard {path} is missing, though the index lists it")
    if (size := Path(path).stat().st_size) != shard.num_bytes:
        raise UserError(
            f"shard {path} has {size:,} bytes, and its index says {shard.num_bytes:,}; it has "
            "changed since it was indexed: run `largebatch index ... overwrite=true`"
        )
