"""Shards: numbered tar files of records, with an index.json that says what lies where.

A shard is a plain webdataset tar. The index cuts each into segments of up to 1,000 records, which
are read by byte range, so that any order of segments can be read from a disk or a bucket. In the
`samples` layout a record is a member, `NNNNNNNNN.json`; in the `packed` layout a segment is one,
`NNNNNNNNN.jsonl.zst` (see `packed.py`).
"""

import glob
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from braceexpand import braceexpand
from filelock import FileLock, Timeout

from largebatch.config.tools import LAYOUTS
from largebatch.data.index import (
    INDEX_NAME,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENT_RECORDS,
    Segment,
    Shard,
    ShardIndex,
    Stretch,
    cut_segments,
    with_checksums,
)
from largebatch.data.locations import is_remote
from largebatch.data.packed import PACKED, pack
from largebatch.data.records import Record
from largebatch.data.retries import DEFAULT_RETRIES, Retries
from largebatch.data.tar import MAX_RECORD_BYTES
from largebatch.errors import DataError, UserError
from largebatch.files import writing

__all__ = [
    "INDEX_NAME",
    "Segment",
    "Shard",
    "ShardIndex",
    "ShardWriter",
    "find_files",
    "resolve_source",
    "shard_names",
]


class UnfitRecordError(UserError):
    """A record that can't be written into a shard; the message names it by its id."""


class ShardWriter:
    """Writes records into a folder as shards with an index; a context manager.

    The files are made aside, in `.partial/`, and take their places when the context ends without
    an error: first the shards of an index that is there go, then the new ones come, and the new
    index last. Until then, and after an error, the folder holds what it held. The same records
    give the same bytes. `dropped` counts what the caller leaves out, for the index.

    Raises UserError on entry if another process is writing to the folder, or if there are tar
    files of the same kind in it that no index lists; and where a file can't be written, on a full
    disk for example.
    """

    def __init__(self, folder: Path, *, records_per_shard: int, layout: str = "packed") -> None:
        assert records_per_shard >= 1
        assert layout in LAYOUTS
        self.folder = folder
        self.records_per_shard = records_per_shard
        self.layout = layout
        self.dropped: Counter[str] = Counter()
        self.num_records = 0
        self._partial = folder / ".partial"
        self._replaced: list[Path] = []
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None

    def __enter__(self) -> Self:
        self._is_new = not self.folder.exists()
        self._lock = FileLock(self.folder / ".lock")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
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
                self._leave()
                raise
        return self

    def write(self, record: Record, extra: Mapping[str, Any] | None = None) -> None:
        """Append a record; `extra` holds further fields to keep beside it.

        Raises UserError if the record is larger than a reader would take, or `extra` holds what
        JSON cannot.
        """
        if self._open is None:
            name = f"shard-{len(self._shards):06d}.tar"
            opened = {"packed": _OpenPackedShard, "samples": _OpenShard}[self.layout]
            self._open = opened(self._partial / name, self.folder / name)
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
            if error is None:
                if self._open is not None:
                    self._finish_shard()
                self._put_in_place()
        finally:
            if self._open is not None:
                self._open.abandon()
            self._leave()

    def _leave(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        # Before the lock is released: another process may take it at once.
        if self._is_new and not (self.folder / INDEX_NAME).exists():
            with suppress(OSError):  # it holds something, then
                (self.folder / ".lock").unlink(missing_ok=True)
                self.folder.rmdir()
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
        with writing(self.folder):
            for path in self._replaced:
                path.unlink(missing_ok=True)
            for shard in self._shards:
                (self._partial / shard.file).replace(self.folder / shard.file)
        ShardIndex(tuple(self._shards), dict(sorted(self.dropped.items()))).save(self.folder)


def resolve_source(
    urls: Sequence[str], *, check_present: bool = True, retries: Retries = DEFAULT_RETRIES
) -> list[tuple[str, Shard]]:
    """Find the shards of a source, in order: each one's url and its entry in the index.

    A url is a folder with an index.json, or names tar files beside one, with braces
    (`shard-{000000..000009}.tar`) or globs (remote: in the file's name only).

    `check_present` is whether shards on this machine must be there, in the size that the index
    says. Remote ones are not asked for: there may be very many, and each is a request.

    Raises UserError if a url matches nothing, if a shard holds no records or comes twice, or if
    there is no index; DataError if a shard is missing or has another size.
    """
    indices: dict[str, ShardIndex] = {}
    found: dict[str, Shard] = {}
    for url in urls:
        for folder, file in _locate(url):
            if folder not in indices:
                indices[folder] = ShardIndex.load(folder, retries=retries)
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
                if not shard.num_records:
                    raise UserError(
                        f"shard {path} holds no records; leave it out and index the others anew"
                    )
                if check_present and not is_remote(path):
                    _check_present(path, shard)
                found[path] = shard
    if not found:
        raise UserError("no shards: no urls are given; name folders with an index.json")
    return list(found.items())


def shard_names(shards: Sequence[tuple[str, Shard]]) -> list[str]:
    """Return what the shards of a source are called in the ids of records without one.

    It is the file's name, or the url where shards of several folders have the same.
    """
    files = [shard.file for _, shard in shards]
    return files if len(set(files)) == len(files) else [url for url, _ in shards]


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
    """A shard that is being written to `path`, to stand in `place` later; a member a record."""

    def __init__(self, path: Path, place: Path) -> None:
        # Imported here: it imports torch, which commands that only convert data can do without.
        from webdataset.writer import TarWriter

        self._path = path
        self._place = place
        with writing(place):
            self._file = _HashingFile(path.open("wb"))
        self._tar = TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        self._stretches: list[Stretch] = []
        self.num_records = 0

    def append(self, key: str, content: bytes) -> None:
        self.num_records += 1
        self._add_member(key, "json", content, num_records=1)

    def finish(self) -> Shard:
        with writing(self._place):
            self._tar.close()
            self._file.close()
        with self._path.open("rb") as file:
            segments = with_checksums(cut_segments(self._stretches), file)
            num_bytes = file.seek(0, os.SEEK_END)
        digest = self._file.sha256.hexdigest()
        return Shard(self._path.name, self.num_records, num_bytes, digest, segments)

    def abandon(self) -> None:
        """Let go of a file that will not be finished."""
        # What is left to write may not fit any more. The tar comes first: it would write its end to
        # a closed file when it is collected.
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()

    def _add_member(self, key: str, extension: str, content: bytes, *, num_records: int) -> None:
        begin: int = self._tar.tarstream.offset
        with writing(self._place):
            self._tar.write({"__key__": key, extension: content})
        end: int = self._tar.tarstream.offset
        self._stretches.append(Stretch(begin, end, num_records, is_packed=extension == PACKED))


class _OpenPackedShard(_OpenShard):
    """A shard that is being written, a member a segment."""

    def __init__(self, path: Path, place: Path) -> None:
        super().__init__(path, place)
        self._key = ""
        self._lines: list[bytes] = []
        self._num_bytes = 0

    def append(self, key: str, content: bytes) -> None:
        if (
            len(self._lines) == MAX_SEGMENT_RECORDS
            or self._num_bytes + len(content) > MAX_SEGMENT_BYTES
        ):
            self._flush()
        self._key = self._key or key
        self.num_records += 1
        self._lines.append(content)
        self._num_bytes += len(content) + 1

    def finish(self) -> Shard:
        self._flush()
        return super().finish()

    def _flush(self) -> None:
        if self._lines:
            content = pack(self._lines)
            self._add_member(self._key, PACKED, content, num_records=len(self._lines))
        self._key, self._lines, self._num_bytes = "", [], 0


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
        raise UnfitRecordError(
            f"record {record.id!r} has further fields named {sorted(taken)}, which are taken; "
            "rename them"
        )
    try:
        data = json.dumps(content | dict(extra), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UnfitRecordError(f"record {record.id!r} does not fit into JSON: {error}") from None
    if len(data) > MAX_RECORD_BYTES:
        raise UnfitRecordError(
            f"record {record.id!r} takes {len(data):,} bytes; at most {MAX_RECORD_BYTES:,} are "
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
    if not Path(path).is_file():
        raise DataError(
            f"shard {path} is missing, though the index lists it; bring it back, or run "
            "`largebatch index ... overwrite=true`",
            kind="missing",
        )
    if (size := Path(path).stat().st_size) != shard.num_bytes:
        raise DataError(
            f"shard {path} has {size:,} bytes, and its index says {shard.num_bytes:,}; it has "
            "changed since it was indexed: put the file back, or run `largebatch index ... "
            "overwrite=true`",
            kind="changed",
        )
