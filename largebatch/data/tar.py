"""Reads tar members and samples from others' shards as what they are: data from strangers.

Nothing is written to disk and nothing but UTF-8 JSON and text is decoded. A member of another kind
(a link, a device, a pickle, a picture) ends the reading with an error, before its contents are
looked at.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import IO, Any, NamedTuple

from largebatch.errors import UserError

MAX_MEMBER_BYTES = 64 * 2**20

# KEY.json, or a text for each field: KEY.query.txt, KEY.document.txt, KEY.negative.0.txt.
_TEXT_MEMBER = re.compile(r"(?:([a-z0-9_-]+)(?:\.([0-9]+))?\.)?txt")


class Member(NamedTuple):
    """Where one file lies in a tar."""

    name: str
    """Its name."""
    key: str
    """What it shares with the other members of its sample: the name up to its first dot."""
    extension: str
    """What follows that dot, in lower case."""
    offset: int
    """Byte at which its headers begin."""
    data_offset: int
    """Byte at which its contents begin."""
    num_bytes: int
    """Size of its contents."""

    @property
    def end(self) -> int:
        """Byte at which the next member begins."""
        return self.data_offset + -(-self.num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def iter_members(
    file: IO[bytes], *, url: str, base: int = 0, end: int | None = None
) -> Iterator[Member]:
    """List the members of a tar, reading headers only.

    `file` stands at a header; offsets count from there, plus `base`. With `end` the members must
    fill the bytes up to it (which is `base` plus the length of `file`); without, the list ends at
    the archive's end mark. Folders are passed over; they hold nothing.

    Raises UserError for everything that `url` should not contain.
    """
    # Imported here: it imports torch, which commands that only convert data can do without.
    from webdataset.tariterators import base_plus_ext

    try:
        # A long name's plain header is cut, maybe within a character; the name is checked below.
        tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
        header = tar.next()
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise UserError(
            f"{url}: no tar header at byte {base} ({error}); shards must be tar files, not "
            "compressed, as they were when they were indexed"
        ) from None
    while header is not None:
        name, size = header.name, header.size
        offset = base + header.offset
        where = f"{url}: member {name!r} at byte {offset}"
        if header.isdir():
            if end is not None and base + tar.offset >= end:
                return
        else:
            if not (header.isfile() and header.sparse is None):
                raise UserError(f"{where} is a link, a device or the like; only files are allowed")
            if not 0 <= size <= MAX_MEMBER_BYTES:
                raise UserError(
                    f"{where} claims {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are allowed"
                )
            if name.startswith("/") or ".." in name.split("/"):
                raise UserError(f"{where} has a name that leads out of the archive")
            if not _is_utf8(name):
                raise UserError(f"{where} has a name that is not UTF-8")
            key, extension = base_plus_ext(name)
            extension = extension.lower() if extension else ""
            if not is_allowed(extension):
                raise UserError(
                    f"{where} is no text: allowed are KEY.json and KEY.FIELD.txt, such as "
                    "KEY.query.txt, KEY.document.txt, KEY.negative.0.txt"
                )
            member = Member(name, key, extension, offset, base + header.offset_data, size)
            if end is not None and member.end > end:
                raise UserError(
                    f"{where} is cut off: it ends at byte {member.end}, after byte {end}"
                )
            yield member
            if member.end == end:
                return
        try:
            file.seek(tar.offset)
            header = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            header = None
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise UserError(f"{url}: no tar header at byte {base + tar.offset} ({error})") from None
    if end is not None:
        raise UserError(f"{url}: the archive ends before byte {end}")


def is_allowed(extension: str) -> bool:
    """Whether members with this extension (all that follows the first dot) may be decoded.

    >>> [is_allowed(e) for e in ("json", "query.txt", "negative.0.txt", "pkl", "json.gz")]
    [True, True, True, False, False]
    """
    return extension == "json" or _TEXT_MEMBER.fullmatch(extension) is not None


def iter_samples(
    members: Iterator[Member], contents: memoryview, *, url: str, base: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decode members into samples: consecutive members that share a key, as webdataset does.

    `contents` are the bytes from byte `base` on. Yields each sample's key and fields: those of
    its JSON object, and each text under its own name (`KEY.query.txt` is `query`,
    `KEY.negative.0.txt` is `negative_0`, `KEY.txt` is `text`).
    """
    for key, group in groupby(members, key=lambda member: member.key):
        fields: dict[str, Any] = {}
        for member in group:
            start = member.data_offset - base
            data = contents[start : start + member.num_bytes]
            for name, value in _decode(member, data, url).items():
                if name in fields:
                    raise UserError(
                        f"{url}: member {member.name!r} at byte {member.offset} gives the field "
                        f"{name!r} of sample {key!r} a second time"
                    )
                fields[name] = value
        yield key, fields


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(member: Member, data: memoryview, url: str) -> dict[str, Any]:
    where = f"{url}: member {member.name!r}"
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: {error.reason} at byte {member.data_offset + error.start}"
        ) from None
    if member.extension != "json":
        match = _TEXT_MEMBER.fullmatch(member.extension)
        assert match is not None
        name = match[1] or "text"
        return {f"{name}_{match[2]}" if match[2] else name: text}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} at byte {member.offset} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{where} at byte {member.offset} holds {type(value).__name__} instead of an object"
        )
    return value
