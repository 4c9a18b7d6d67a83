"""Packed members: up to 1,000 records as JSON lines, compressed by Zstandard, in one tar member.

A plain webdataset pipeline reads them with five lines more:

    def unpack(samples):
        for sample in samples:
            for line in zstandard.decompress(sample["jsonl.zst"]).splitlines():
                yield json.loads(line)

    pairs = wds.WebDataset(urls, shardshuffle=False).compose(unpack)
"""

from collections.abc import Sequence

import zstandard

from largebatch.errors import DataError
from largebatch.shards.tar import MAX_MEMBER_BYTES, PACKED

__all__ = ["MAX_UNPACKED_BYTES", "PACKED", "pack", "unpack"]

MAX_UNPACKED_BYTES = MAX_MEMBER_BYTES

_LEVEL = 9
# Zstandard makes at most 2**15 bytes of one, so that a step's output is bounded too.
_STEP_BYTES = 2**11
# zstd's own default bound: what a decoder holds beside its output.
_MAX_WINDOW_BYTES = 2**27


def pack(lines: Sequence[bytes]) -> bytes:
    """Compress JSON lines; the same lines give the same bytes (with the same zstandard)."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    return compressor.compress(b"\n".join(lines) + b"\n")


def unpack(data: bytes, *, where: str) -> list[bytes]:
    """Return the lines of a packed member; empty ones at the end don't count.

    Raises DataError, before memory is used for it, if the contents are larger than allowed, and
    if they are no Zstandard. `where` begins its message.
    """
    try:
        declared = zstandard.frame_content_size(data)
        if declared > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{where} unpacks to {declared:,} bytes; at most {MAX_UNPACKED_BYTES:,} are "
                "allowed",
                kind="too_large",
            )
        content = _decompress(data, where)
    except zstandard.ZstdError as error:
        raise DataError(f"{where} cannot be unpacked: {error}", kind="undecodable") from None
    lines = content.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _decompress(data: bytes, where: str) -> bytes:
    # Step by step: the size that is declared may be absent or wrong, and other frames may follow.
    parts: list[bytes] = []
    num_bytes = position = 0
    while position < len(data):
        frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        while not frame.eof:
            if position >= len(data):
                raise DataError(f"{where} ends within its compressed data", kind="truncated")
            parts.append(frame.decompress(data[position : position + _STEP_BYTES]))
            position += _STEP_BYTES
            num_bytes += len(parts[-1])
            if num_bytes > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"{where} unpacks to more than the {MAX_UNPACKED_BYTES:,} bytes that are "
                    "allowed",
                    kind="too_large",
                )
        position = min(position, len(data)) - len(frame.unused_data)
    return b"".join(parts)
