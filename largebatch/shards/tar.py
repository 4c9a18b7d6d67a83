"""Reads the members of others' shards as what they are: data from strangers.

Nothing is written to disk. A member of another kind (a link, a device, a pickle, a picture) ends
the reading with an error, before its contents are looked at. What decodes contents is in
`segment.py` and `packed.py`.

Headers as tar writers usually make them are read here, ten times as fast as by `tarfile`, which
reads all others.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from largebatch.errors import DataError

MAX_MEMBER_BYTES = 64 * 2**20
# JSON may take thirty times its size in memory (a list of empty lists does).
MAX_RECORD_BYTES = 16 * 2**20
# All members of a sample together, headers included.
MAX_SAMPLE_BYTES = 128 * 2**20
PACKED = "jsonl.zst"

# The key, and the extension: what follows the first dot of the last part, as webdataset has it.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
# The most usual of names, with nothing in it to be afraid of.
_SIMPLE_NAME = re.compile(r"([0-9A-Za-z_-][0-9A-Za-z_/-]*)\.json")
# KEY.json, or a text for each field: KEY.query.txt, KEY.document.txt, KEY.negative.0.txt.
_TEXT_MEMBER = re.compile(r"(?:([a-z0-9_-]+)(?:\.([0-9]+))?\.)?txt")

_BLOCK = tarfile.BLOCKSIZE
_MAGIC = (b"ustar\x0000", b"ustar  \x00")
# Bytes 100 to 156 of a header: mode, uid, gid, size, mtime, checksum and the type of a file.
_PLAIN_FIELDS = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 [0\0]")
_NO_PREFIX = bytes(155)
# What a PAX header for all that follows may say; the rest would change what members are, and is
# not seen by who reads a part of the archive.
_HARMLESS_GLOBALS = {"comment", "charset", "mtime", "atime", "ctime", "uname", "gname"}


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
        return self.data_offset + -(-self.num_bytes // _BLOCK) * _BLOCK

    @property
    def is_packed(self) -> bool:
        """Whether it holds many records, as compressed JSON lines."""
        return self.extension == PACKED


def iter_members(
    file: IO[bytes], *, url: str, base: int = 0, end: int | None = None
) -> Iterator[Member]:
    """List the members of a tar, reading headers only.

    `file` stands at a header and can seek back over it; offsets count from there, plus `base`.
    With `end` the members must fill the bytes up to it (which is `base` plus the length of
    `file`); without, the list ends at the archive's end mark. Folders are passed over; they hold
    nothing. After each member, `file` may be read up to its end.

    Raises DataError for everything that `url` should not contain.
    """
    unusual: tarfile.TarFile | None = None
    position = 0
    while True:
        block = file.read(_BLOCK)
        # Once there is a header for all that follows, tarfile must see the rest.
        header = None if unusual is not None and unusual.pax_headers else _plain_header(block)
        offset = base + position
        if header is not None:
            name, size = header
            data_offset = offset + _BLOCK
            position += _BLOCK + -(-size // _BLOCK) * _BLOCK
        else:
            unusual = unusual or _empty_tar()
            info = _next_header(unusual, file, position, url=url, base=base)
            if info is None:
                break
            position = unusual.offset
            if info.isdir():
                if base + position == end:
                    return
                file.seek(position)
                continue
            name, size, data_offset = info.name, info.size, base + info.offset_data
            _check_kind(info, unusual, where=_where(url, name, offset))
        simple = _SIMPLE_NAME.fullmatch(name)
        key, extension = (simple[1], "json") if simple else _checked_name(name, offset, url)
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise DataError(
                f"{_where(url, name, offset)} claims {size:,} bytes; at most "
                f"{MAX_MEMBER_BYTES:,} are allowed",
                kind="too_large",
            )
        if end is not None and base + position > end:
            raise DataError(
                f"{_where(url, name, offset)} is cut off: it ends at byte {base + position}, after "
                f"byte {end}",
                kind="truncated",
            )
        yield Member(name, key, extension, offset, data_offset, size)
        if base + position == end:
            return
        file.seek(position)
    if end is not None:
        raise DataError(f"{url}: the archive ends before byte {end}", kind="truncated")


def is_allowed(extension: str) -> bool:
    """Whether members with this extension (all that follows the first dot) may be decoded.

    >>> [is_allowed(e) for e in ("json", "query.txt", "negative.0.txt", "pkl", "json.gz")]
    [True, True, True, False, False]
    """
    return extension in ("json", PACKED) or _TEXT_MEMBER.fullmatch(extension) is not None


def text_field(extension: str) -> str:
    """Return the field that a text member gives: `query.txt` is `query`.

    >>> [text_field(e) for e in ("query.txt", "negative.0.txt", "txt")]
    ['query', 'negative_0', 'text']
    """
    match = _TEXT_MEMBER.fullmatch(extension)
    assert match is not None
    name = match[1] or "text"
    return f"{name}_{match[2]}" if match[2] else name


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into its key and its extension, in lower case; empty if it has none.

    >>> split_name("a.b/c.Query.txt")
    ('a.b/c', 'query.txt')
    """
    match = _KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _plain_header(block: bytes) -> tuple[str, int] | None:
    """Return the name and size of a file from its header, or None if it has something unusual."""
    fields = _PLAIN_FIELDS.fullmatch(block, 100, 157)
    if fields is None or block[257:265] not in _MAGIC or block[345:500] != _NO_PREFIX:
        return None
    size, checksum = fields.groups()
    # The checksum is the sum of all bytes with eight spaces in its own place. The low half of
    # adler32 is 1 and the sum of all bytes (up to 65,520; more would not be found equal).
    if (zlib.adler32(block) & 0xFFFF) - 1 - sum(checksum) - 32 + 8 * 32 != int(checksum, 8):
        return None
    name, end_mark, _ = block[:100].partition(b"\0")
    if len(block) != _BLOCK or not name or not end_mark or name.endswith(b"/"):
        return None
    try:
        return name.decode(), int(size, 8)
    except UnicodeDecodeError:
        return None


def _empty_tar() -> tarfile.TarFile:
    # A long name's plain header is cut, maybe within a character; the name is checked later.
    return tarfile.TarFile(
        fileobj=io.BytesIO(bytes(2 * _BLOCK)), encoding="utf-8", errors="surrogateescape"
    )


def _next_header(
    tar: tarfile.TarFile, file: IO[bytes], position: int, *, url: str, base: int
) -> tarfile.TarInfo | None:
    """Let `tarfile` read the header at `position` of `file`; None at the end mark."""
    tar.fileobj, tar.offset = file, position
    file.seek(position)
    try:
        return tarfile.TarInfo.fromtarfile(tar)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.TarError, ValueError, RecursionError) as error:
        at = base + position
        is_short = isinstance(error, tarfile.EmptyHeaderError | tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
        if position == 0:
            hint = "; shards must be tar files, not compressed, as they were when they were indexed"
        elif is_short:
            hint = "; the file is cut off: put a whole copy in its place"
        else:
            hint = "; the file is damaged: put a good copy in its place"
        raise DataError(
            f"{url}: no tar header at byte {at} ({error}){hint}",
            kind="truncated" if is_short else "undecodable",
        ) from None


def _check_kind(info: tarfile.TarInfo, tar: tarfile.TarFile, *, where: str) -> None:
    if not (info.isfile() and info.sparse is None):
        raise DataError(
            f"{where} is a link, a device or the like; only files are allowed", kind="forbidden"
        )
    if odd := sorted(set(tar.pax_headers) - _HARMLESS_GLOBALS):
        raise DataError(
            f"{where} comes after a header that sets {odd[0]!r} of all members; only their own "
            "headers may",
            kind="forbidden",
        )


def _checked_name(name: str, offset: int, url: str) -> tuple[str, str]:
    """Return the key and the extension of a member, if its name may be in a shard."""
    where = _where(url, name, offset)
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{where} has a name that leads out of the archive", kind="forbidden")
    if not _is_utf8(name):
        raise DataError(f"{where} has a name that is not UTF-8", kind="forbidden")
    key, extension = split_name(name)
    if not is_allowed(extension):
        # webdataset's rule. A dot too many makes another key, which others may share.
        inner = extension
        while "." in inner and not is_allowed(inner):
            inner = inner.partition(".")[2]
        if is_allowed(inner):
            raise DataError(
                f"{where} has a dot in its key: as webdataset has it, the key ends at the name's "
                f"first dot, so that {key!r} is the key and {extension!r} the extension, which is "
                f"none of KEY.json, KEY.FIELD.txt and KEY.{PACKED}; write the samples anew with "
                "keys without dots (v1_0 for v1.0)",
                kind="forbidden",
            )
        raise DataError(
            f"{where} is no text: allowed are KEY.json and KEY.FIELD.txt, such as KEY.query.txt, "
            f"KEY.document.txt, KEY.negative.0.txt, and KEY.{PACKED}",
            kind="forbidden",
        )
    return key, extension


def _where(url: str, name: str, offset: int) -> str:
    shown = name if len(name) <= 300 else f"{name[:300]}..."
    return f"{url}: member {shown!r} at byte {offset}"


def _is_utf8(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
