"""The records of one segment: read by byte range, and decoded one by one when they are asked for.

What is wrong with one record concerns that record only; what is wrong with the bytes concerns the
whole segment.
"""

import codecs
import io
import json
import sys
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import orjson

from largebatch.errors import DataError
from largebatch.shards.index import Segment
from largebatch.shards.packed import unpack
from largebatch.shards.records import Record, is_blank, make_record
from largebatch.shards.tar import (
    MAX_RECORD_BYTES,
    MAX_SAMPLE_BYTES,
    Member,
    iter_members,
    split_name,
    text_field,
)
from largebatch.stores.locations import read_bytes
from largebatch.stores.retries import DEFAULT_RETRIES, Retries

_REINDEX = "run `largebatch index ... overwrite=true`"


class SegmentRecords(ABC):
    """The records of one segment, undecoded."""

    def __init__(
        self,
        url: str,
        *,
        fields: Mapping[str, str],
        source: str,
        shard_name: str,
        max_chars: int | None,
        needs: Collection[str],
        texts: bool,
    ) -> None:
        self.url = url
        self.fields = dict(fields)
        self.needs = needs
        self.source = source
        self.max_chars = max_chars
        self.shard_name = shard_name
        self.texts = texts

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that is held."""

    def record(self, number: int) -> Record:
        """Decode a record.

        Raises DataError, naming shard, member and byte, if it is no UTF-8 or no JSON, lacks a
        field or what is in `needs`, has an empty query or document, or a text of more than
        `max_chars` characters.
        """
        mapping = self.mapping(number)
        try:
            record = make_record(
                mapping,
                fields=self.fields,
                source=self.source,
                default_id=self._default_id(number),
                texts=self.texts,
            )
            self._check(record)
        except DataError as error:
            raise DataError(f"{self._where(number)}: {error}", kind=error.kind) from None
        return record

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, range(len(self)))

    @abstractmethod
    def mapping(self, number: int) -> dict[str, Any]:
        """Decode all fields of a record, whatever they hold; raises DataError as `record` does."""

    @abstractmethod
    def _where(self, number: int) -> str:
        """Name the place of a record in an error."""

    @abstractmethod
    def _default_id(self, number: int) -> str:
        """Return the id of a record that has none of its own."""

    def _check(self, record: Record) -> None:
        query, document, most = record.query, record.document, self.max_chars
        lacks_query = is_blank(query) and not self.texts
        if lacks_query or is_blank(document):
            side = "query" if lacks_query else "text" if self.texts else "document"
            raise DataError(f"record {record.id!r} has an empty {side}", kind="empty")
        for need in self.needs:
            if getattr(record, need) is None:
                raise DataError(
                    f"record {record.id!r} has no {need}, which what is trained needs of every "
                    "record; give it some, or leave the record out",
                    kind="field",
                )
        if most is None or (len(query) <= most and len(document) <= most and not record.negatives):
            return
        for text in (query, document, *record.negatives):
            if len(text) > most:
                raise DataError(
                    f"record {record.id!r} has a text of {len(text):,} characters, more than "
                    f"data.max_chars={most}; shorten it, or raise the option",
                    kind="too_large",
                )


class PackedRecords(SegmentRecords):
    """The records of a packed member, a line each."""

    def __init__(self, url: str, member: Member, lines: list[bytes], **options: Any) -> None:
        super().__init__(url, **options)
        self._name = member.name
        self._offset = member.offset
        self._key = member.key
        self._lines = lines
        self._num_bytes = sum(map(sys.getsizeof, lines)) + sys.getsizeof(lines)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return self._num_bytes

    def mapping(self, number: int) -> dict[str, Any]:
        """Decode all fields of a record, whatever they hold."""
        line = self._lines[number]
        try:
            return _decode_json(line, first_byte=None)
        except DataError as error:
            raise DataError(f"{self._where(number)} {error}", kind=error.kind) from None

    def _where(self, number: int) -> str:
        return f"{self.url}: member {self._name!r} at byte {self._offset} (line {number + 1})"

    def _default_id(self, number: int) -> str:
        return f"{self.shard_name}:{self._key}:{number + 1}"


class SampleRecords(SegmentRecords):
    """Records in members of their own: consecutive ones that share a key, as webdataset does."""

    def __init__(
        self, url: str, members: Sequence[Member], contents: list[bytes], **options: Any
    ) -> None:
        super().__init__(url, **options)
        self._contents = contents
        self._names = [member.name for member in members]
        self._offsets = array("q", [member.offset for member in members])
        self._data_offsets = array("q", [member.data_offset for member in members])
        # Number of each record's first member, and of the one after the last.
        self._firsts = array("q", _firsts([member.key for member in members]))
        self._num_bytes = (
            sum(map(sys.getsizeof, contents))
            + sum(map(sys.getsizeof, self._names))
            + 5 * 8 * len(members)
        )

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        return self._num_bytes

    def _members(self, number: int) -> range:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return range(self._firsts[number], self._firsts[number + 1])

    def mapping(self, number: int) -> dict[str, Any]:
        """Decode all fields of a record, whatever they hold."""
        members = self._members(number)
        if len(members) == 1:
            return self._decode(members[0])
        fields: dict[str, Any] = {}
        for member in members:
            for name, value in self._decode(member).items():
                if name in fields:
                    key, _ = split_name(self._names[member])
                    raise DataError(
                        f"{self._member(member)} gives the field {name!r} of sample {key!r} a "
                        "second time",
                        kind="field",
                    )
                fields[name] = value
        return fields

    def _decode(self, member: int) -> dict[str, Any]:
        content, name = self._contents[member], self._names[member]
        try:
            if name.endswith(".json"):
                return _decode_json(content, first_byte=self._data_offsets[member])
            _, extension = split_name(name)
            if extension == "json":
                return _decode_json(content, first_byte=self._data_offsets[member])
            text = _decode_text(content, first_byte=self._data_offsets[member])
            return {text_field(extension): text}
        except DataError as error:
            raise DataError(f"{self._member(member)} {error}", kind=error.kind) from None

    def _member(self, member: int) -> str:
        return f"{self.url}: member {self._names[member]!r} at byte {self._offsets[member]}"

    def _where(self, number: int) -> str:
        members = self._members(number)
        if len(members) == 1:
            return self._member(members[0])
        key, _ = split_name(self._names[members[0]])
        return f"{self.url}: sample {key!r} at byte {self._offsets[members[0]]}"

    def _default_id(self, number: int) -> str:
        key, _ = split_name(self._names[self._firsts[number]])
        return f"{self.shard_name}:{key}"


def read_segment(
    url: str,
    segment: Segment,
    *,
    fields: Mapping[str, str],
    source: str,
    shard_name: str | None = None,
    max_chars: int | None = None,
    needs: Collection[str] = (),
    texts: bool = False,
    retries: Retries = DEFAULT_RETRIES,
) -> SegmentRecords:
    """Read one segment of the shard at `url`, by byte range, without decoding its records.

    `fields`, `source` and `texts` are as in `record_from_mapping`. A record without an id gets
    `FILE:KEY`, and in a packed member `FILE:KEY:LINE`; FILE is `shard_name`, where that is given.
    `needs` may be `scores` and `label`, without which a record can't be used.

    Raises DataError, naming the shard, the bytes and as far as possible the member, if the segment
    as a whole can't be used: it can't be read, is not what was indexed, or holds something that
    must not be in a shard.
    """
    end = segment.offset + segment.num_bytes
    if segment.num_bytes > MAX_SAMPLE_BYTES:
        raise DataError(
            f"shard {url} has a segment of {segment.num_bytes:,} bytes at byte {segment.offset}; "
            f"at most {MAX_SAMPLE_BYTES:,} are allowed",
            kind="too_large",
        )
    try:
        data = read_bytes(url, segment.offset, end, retries=retries)
    except FileNotFoundError:
        raise DataError(
            f"shard {url} is missing, though the index lists it; bring it back, or {_REINDEX}",
            kind="missing",
        ) from None
    if len(data) != segment.num_bytes:
        raise DataError(
            f"shard {url} gave {len(data):,} bytes for the {segment.num_bytes:,} from byte "
            f"{segment.offset:,} on; it is cut off: put a whole copy in its place, or {_REINDEX}",
            kind="truncated",
        )
    options = {
        "fields": fields,
        "source": source,
        "shard_name": shard_name or url.rpartition("/")[2],
        "max_chars": max_chars,
        "needs": needs,
        "texts": texts,
    }
    if segment.crc32 >= 0 and (crc32 := zlib.crc32(data)) != segment.crc32:
        detail = _first_fault(url, segment, data, options)
        raise DataError(
            f"shard {url} has changed since it was indexed, between bytes {segment.offset} and "
            f"{end} (crc32 {crc32:08x}, and the index says {segment.crc32:08x}): {detail}; put the "
            f"file back, or {_REINDEX}",
            kind="changed",
        )
    records = _parse(url, segment, data, options)
    if len(records) != segment.num_records:
        raise DataError(
            f"shard {url} has {len(records)} records from byte {segment.offset} on, and its index "
            f"{segment.num_records}; it has changed since it was indexed: {_REINDEX}",
            kind="changed",
        )
    return records


def _parse(url: str, segment: Segment, data: bytes, options: Mapping[str, Any]) -> SegmentRecords:
    end = segment.offset + segment.num_bytes
    members: list[Member] = []
    contents: list[bytes] = []
    for member in iter_members(io.BytesIO(data), url=url, base=segment.offset, end=end):
        start = member.data_offset - segment.offset
        members.append(member)
        contents.append(data[start : start + member.num_bytes])
    packed = [member for member in members if member.is_packed]
    if not packed:
        return SampleRecords(url, members, contents, **options)
    if len(members) > 1:
        raise DataError(
            f"{url}: member {packed[0].name!r} at byte {packed[0].offset} is packed and shares a "
            f"segment with others; {_REINDEX}",
            kind="changed",
        )
    where = f"{url}: member {packed[0].name!r} at byte {packed[0].offset}"
    return PackedRecords(url, packed[0], unpack(contents[0], where=where), **options)


def _first_fault(url: str, segment: Segment, data: bytes, options: Mapping[str, Any]) -> str:
    """Say what is wrong with changed bytes, as far as that shows."""
    try:
        for _ in _parse(url, segment, data, options):
            pass
    except DataError as error:
        return str(error)
    return "every record in them still decodes"


def _firsts(keys: Sequence[str]) -> list[int]:
    firsts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return [*firsts, len(keys)]


def _decode_json(data: bytes, *, first_byte: int | None) -> dict[str, Any]:
    if len(data) > MAX_RECORD_BYTES:
        raise DataError(
            f"takes {len(data):,} bytes; at most {MAX_RECORD_BYTES:,} are allowed for a record",
            kind="too_large",
        )
    if data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
        first_byte = first_byte and first_byte + len(codecs.BOM_UTF8)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        _decode_text(data, first_byte=first_byte)
        raise DataError(f"is not JSON: {error}", kind="undecodable") from None
    if type(value) is not dict:
        raise DataError(f"holds {type(value).__name__} instead of an object", kind="undecodable")
    # As many as there are keys, if no object is inside and no text holds these two characters.
    # Only then is it sure at once that none comes twice.
    if data.count(b'":') != len(value):
        _check_keys(data)
    return value


def _check_keys(data: bytes) -> None:
    """Raise DataError if a key of the outermost object comes twice: which one would count?"""
    # Inner objects are made first, so that the last list of pairs is the outermost one's.
    pairs: Sequence[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> None:
        nonlocal pairs
        pairs = found

    try:
        json.loads(data, object_pairs_hook=keep)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", kind="undecodable") from None
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise DataError(f"gives the field {name[:60]!r} a second time", kind="field")
        seen.add(name)


def _decode_text(data: bytes, *, first_byte: int | None) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = f"{error.start} of the line" if first_byte is None else str(first_byte + error.start)
        raise DataError(f"is not UTF-8: {error.reason} at byte {at}", kind="undecodable") from None
