"""Shards: numbered tar files of records, with an index.json that says what lies where.

A shard is a plain webdataset tar. The index cuts each into segments of up to 1,000 records, which
are read by byte range, so that any order of segments can be read from a disk or a bucket. In the
`samples` layout a record is a member, `NNNNNNNNN.json`; in the `packed` layout a segment is one,
`NNNNNNNNN.jsonl.zst` (see `packed.py`).
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock, Timeout

from largebatch.config.tools import LAYOUTS
from largebatch.errors import UserError
from largebatch.files import writing
from largebatch.shards.index import (
    INDEX_NAME,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENT_RECORDS,
    RecordSpan,
    Shard,
    ShardIndex,
    cut_segments,
    with_checksums,
)
from largebatch.shards.packed import PACKED, pack
from largebatch.shards.records import Record
from largebatch.shards.tar import MAX_RECORD_BYTES


class UnfitRecordError(UserError):
    """A record that can't be written into a shard; the message names it by its id."""


class ShardWriter:
    """Writes records into a folder as shards with an index; a context manager.

    The files are made aside, in `.partial/`, and take their places when the context ends without
    an error: first the shards of an index that is there go, then the new ones come, and the new
    index last. Until then, and after an error, the folder holds what it held. The same records
    give the same bytes. `texts` is whether the records are texts without queries. `dropped` counts
    what the caller leaves out, for the index.

    Raises UserError on entry if another process is writing to the folder, or if there are tar
    files of the same kind in it that no index lists; and where a file can't be written, on a full
    disk for example.
    """

    def __init__(
        self,
        folder: Path,
        *,
        records_per_shard: int,
        layout: str = "packed",
        texts: bool = False,
    ) -> None:
        assert records_per_shard >= 1
        assert layout in LAYOUTS
        self.folder = folder
        self.records_per_shard = records_per_shard
        self.layout = layout
        self.texts = texts
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
        content = {"text": record.document} if self.texts else _pair(record)
        self._open.append(f"{self.num_records:09d}", _encode(record, content, extra or {}))
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
        self._shards.append(self._open.finish()._replace(holds_texts=self.texts))
        self._open = None

    def _put_in_place(self) -> None:
        with writing(self.folder):
            for path in self._replaced:
                path.unlink(missing_ok=True)
            for shard in self._shards:
                (self._partial / shard.file).replace(self.folder / shard.file)
        ShardIndex(tuple(self._shards), dict(sorted(self.dropped.items()))).save(self.folder)


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
        self._spans: list[RecordSpan] = []
        self.num_records = 0

    def append(self, key: str, content: bytes) -> None:
        self.num_records += 1
        self._add_member(key, "json", content, num_records=1)

    def finish(self) -> Shard:
        with writing(self._place):
            self._tar.close()
            self._file.close()
        with self._path.open("rb") as file:
            segments = with_checksums(cut_segments(self._spans), file)
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
        self._spans.append(RecordSpan(begin, end, num_records, is_packed=extension == PACKED))


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


def _pair(record: Record) -> dict[str, Any]:
    content: dict[str, Any] = {"query": record.query, "document": record.document}
    if record.negatives:
        content["negatives"] = record.negatives
    if record.scores is not None:
        content["scores"] = record.scores
    if record.label is not None:
        content["label"] = record.label
    return content


def _encode(record: Record, content: dict[str, Any], extra: Mapping[str, Any]) -> bytes:
    content = content | {"source": record.source, "id": record.id}
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
