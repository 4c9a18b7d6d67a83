"""Poisoned shards, as a stranger could hand them out: none runs, writes, or fills the memory.

Each is indexed and read as a user would: `largebatch index`, then the segments. Those that an index
can be made of without harm must fail when they are read.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from largebatch.commands import index
from largebatch.config import IndexConfig
from largebatch.errors import DataError, UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.index import Segment
from largebatch.shards.packed import pack
from largebatch.shards.segment import read_segment

MIB = 2**20
PAIR = b'{"query": "q", "document": "d"}'
PEAK_BYTES = 300 * MIB


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def header(name, size=0, kind=tarfile.REGTYPE, **changes):
    """A header as it is, valid or not."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = changes.pop("linkname", "")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = changes.pop("size_field", b"%011o\0" % size)
    for position, data in changes.pop("patches", {}).items():
        block[position : position + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = changes.pop("checksum", b"%06o\0 " % sum(block))
    assert not changes
    return bytes(block)


def member(name, content=b"", kind=tarfile.REGTYPE, **changes):
    return header(name, len(content), kind, **changes) + content + bytes(-len(content) % 512)


def torch_file(canary):
    buffer = io.BytesIO()
    torch.save({"x": Payload(canary)}, buffer)
    return buffer.getvalue()


def pickled(canary):
    from multiprocessing.reduction import ForkingPickler

    return bytes(ForkingPickler.dumps(Payload(canary)))


def object_array(canary):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zipped(canary):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil", str(canary))
    return buffer.getvalue()


def zst_bomb(*, declared):
    """Zeros, 256 MiB of them in some ten kilobytes."""
    if declared:
        compressor = zstandard.ZstdCompressor(level=1).compressobj(size=2**28)
    else:
        compressor = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [compressor.compress(bytes(MIB)) for _ in range(256)]
    return b"".join([*parts, compressor.flush()])


def lying_frame():
    """It declares five bytes and holds many more."""
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=False).compress(b"x" * 100))
    assert zstandard.frame_content_size(bytes(frame)) == 100
    frame[frame.index(100)] = 5
    return bytes(frame)


def many_frames():
    """Frames that are each within bounds, and together are not."""
    return zstandard.ZstdCompressor().compress(bytes(40 * MIB)) * 4


def large_window():
    """A frame that asks its reader for a window of 2 GiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(PAIR) + compressor.flush()


def pax(content, kind=tarfile.XHDTYPE):
    return member("pax", content, kind) + member("a.json", PAIR)


def pax_record(key, value):
    body = f" {key}={value}\n"
    size = len(body) + len(str(len(body) + 2))
    return f"{size}{body}".encode()


def gnu_sparse():
    real = b"%011o\0" % 2**33
    # Offset and size of one piece, then whether more follow, and the real size.
    patches = {386: b"%011o\0" % 0 + b"%011o\0" % 512, 482: b"\0", 483: real, 257: b"ustar  \0"}
    return member("a.json", PAIR, tarfile.GNUTYPE_SPARSE, patches=patches)


def packed(content):
    return member("0.jsonl.zst", content)


def plain(content):
    return member("a.json", content)


# Name: (the shard's bytes from the canary's path, a part of the message, its kind).
CASES = {
    "pickle": (lambda c: member("a.pkl", pickled(c)), "'a.pkl' at byte 0", "forbidden"),
    "pickle-pyd": (lambda c: member("a.pyd", pickled(c)), "'a.pyd' at byte 0", "forbidden"),
    "pickle-after-good": (
        lambda c: plain(PAIR) + member("a.pickle", pickled(c)),
        "'a.pickle' at byte 1024",
        "forbidden",
    ),
    "torch": (lambda c: member("a.pth", torch_file(c)), "'a.pth'", "forbidden"),
    "torch-pt": (lambda c: member("a.pt", torch_file(c)), "'a.pt'", "forbidden"),
    "numpy-objects": (lambda c: member("a.npy", object_array(c)), "'a.npy'", "forbidden"),
    "numpy-zip": (lambda c: member("a.npz", zipped(c)), "'a.npz'", "forbidden"),
    "pickle-named-json": (lambda c: plain(pickled(c)), "is not", "undecodable"),
    "pickle-in-packed": (lambda c: packed(pack([pickled(c)])), "(line", "undecodable"),
    "json-gz-bomb": (
        lambda c: member("a.json.gz", gzip.compress(bytes(8 * MIB))),
        "'a.json.gz'",
        "forbidden",
    ),
    "double-extension": (lambda c: member("a.pkl.json.pkl", b""), "'a.pkl.json.pkl'", "forbidden"),
    "zst-bomb": (lambda c: packed(zst_bomb(declared=True)), "268,435,456", "too_large"),
    "zst-bomb-undeclared": (lambda c: packed(zst_bomb(declared=False)), "more than", "too_large"),
    "zst-many-frames": (lambda c: packed(many_frames()), "more than", "too_large"),
    "zst-lying": (lambda c: packed(lying_frame()), "cannot be unpacked", "undecodable"),
    "zst-large-window": (lambda c: packed(large_window()), "cannot be unpacked", "undecodable"),
    "zst-cut": (lambda c: packed(pack([PAIR] * 9)[:-9]), "ends within", "truncated"),
    "zst-garbage": (lambda c: packed(b"\xff" * 999), "cannot be unpacked", "undecodable"),
    "traversal": (lambda c: member(f"../../{c.name}.json", PAIR), "leads out", "forbidden"),
    "traversal-inside": (lambda c: member("a/../../b.json", PAIR), "leads out", "forbidden"),
    "absolute": (lambda c: member("/tmp/a.json", PAIR), "leads out", "forbidden"),
    "absolute-prefix": (
        lambda c: member("a.json", PAIR, patches={345: b"/etc"}),
        "'/etc/a.json'",
        "forbidden",
    ),
    "absolute-pax": (lambda c: pax(pax_record("path", "/etc/a.json")), "leads out", "forbidden"),
    "symlink": (
        lambda c: header("a.json", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "link",
        "forbidden",
    ),
    "hard-link": (
        lambda c: header("a.json", kind=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "link",
        "forbidden",
    ),
    "device": (lambda c: header("a.json", kind=tarfile.CHRTYPE), "device", "forbidden"),
    "block-device": (lambda c: header("a.json", kind=tarfile.BLKTYPE), "device", "forbidden"),
    "fifo": (lambda c: header("a.json", kind=tarfile.FIFOTYPE), "device", "forbidden"),
    "sparse": (lambda c: gnu_sparse(), "'a.json'", "forbidden"),
    "sparse-pax": (
        lambda c: pax(pax_record("GNU.sparse.map", "0,1") + pax_record("GNU.sparse.size", 2**40)),
        "'a.json'",
        "forbidden",
    ),
    "claims-much": (lambda c: header("a.json", 2**32) + PAIR, "claims 4,294,967,296", "too_large"),
    "claims-more-in-pax": (
        lambda c: pax(pax_record("size", 2**62)),
        "claims 4,611,686,018,427,387,904",
        "too_large",
    ),
    "negative-size": (
        lambda c: header("a.json", size_field=b"\xff" * 12) + PAIR,
        "claims -1 bytes",
        "too_large",
    ),
    "negative-octal": (
        lambda c: header("a.json", size_field=b"-0000000777\0") + PAIR,
        "claims -511 bytes",
        "too_large",
    ),
    "base-256-size": (
        lambda c: header("a.json", size_field=b"\x80" + struct.pack(">xxxQ", 2**60)) + PAIR,
        "claims 1,152,921,504,606,846,976",
        "too_large",
    ),
    "pax-huge": (lambda c: header("pax", 2**40, tarfile.XHDTYPE), "byte 0", None),
    "pax-huge-number": (lambda c: pax(b"9" * 5000 + b" path=x\n"), "byte 0", None),
    "pax-chain": (
        lambda c: member("pax", pax_record("a", "b"), tarfile.XHDTYPE) * 3000 + plain(PAIR),
        "byte 0",
        "undecodable",
    ),
    "pax-global": (
        lambda c: member("g", pax_record("path", "x.pkl"), tarfile.XGLTYPE) + plain(PAIR) * 2,
        "",
        "forbidden",
    ),
    "long-name-huge": (
        lambda c: header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME),
        "byte 0",
        None,
    ),
    "long-name": (
        lambda c: member("././@LongLink", b"x" * 4 * MIB, tarfile.GNUTYPE_LONGNAME) + plain(PAIR),
        "xxx...' at byte 0 is no text",
        "forbidden",
    ),
    "nested-tar": (lambda c: member("a.tar", plain(PAIR)), "'a.tar'", "forbidden"),
    "nested-tar-named-json": (lambda c: plain(plain(PAIR)), "is not JSON", "undecodable"),
    "deep-json": (lambda c: plain(b'{"query":' * 10**6), "is not JSON", "undecodable"),
    "deep-json-packed": (lambda c: packed(pack([b"[" * 10**7])), "is not JSON", "undecodable"),
    "giant-number": (
        lambda c: plain(b'{"id": ' + b"9" * MIB + b"}"),
        "is not JSON",
        "undecodable",
    ),
    "million-keys": (
        lambda c: plain(
            json.dumps({f"{i:x}": 0 for i in range(10**6)}, separators=(",", ":")).encode()
        ),
        "at most 1,000 are allowed",
        None,
    ),
    "many-empty-lists": (
        lambda c: plain(b"[" + b"[]," * (10**6) + b"[]]"),
        "list instead of an object",
        "undecodable",
    ),
    "huge-json": (
        lambda c: plain(b'{"query": "' + b"q" * 50 * MIB + b'", "document": "d"}'),
        "at most 16,777,216",
        "too_large",
    ),
    "many-keys-twice": (
        lambda c: plain(b"{" + b'"query": "q", ' * 10**5 + b'"document": "d"}'),
        "'query' a second time",
        "field",
    ),
    "nul-in-name": (
        lambda c: member("a.json", PAIR, patches={0: b"a.pkl\0.json\0"}),
        "'a.pkl'",
        "forbidden",
    ),
    "nul-in-pax-name": (
        lambda c: pax(pax_record("path", "a.pkl\0.json")),
        "at byte",
        None,
    ),
    "not-utf8-name": (lambda c: member("a.json", PAIR, patches={0: b"\xff"}), "UTF-8", "forbidden"),
    "sample-of-many-members": (
        lambda c: b"".join(member(f"a.x.{i}.txt", b"x" * 40 * MIB) for i in range(4)),
        "134,217,728",
        "too_large",
    ),
    "duplicate-members": (lambda c: plain(PAIR) * 2, "a second time", "field"),
    "checksum": (lambda c: plain(PAIR).replace(b"a.json", b"b.json"), "bad checksum", None),
    "checksum-blank": (lambda c: member("a.json", PAIR, checksum=b" " * 8), "byte 0", None),
    "pipe-name": (lambda c: member(f"pipe:mkdir {c.name}", PAIR), "is no text", "forbidden"),
    "python": (lambda c: member("a.py", b"import os"), "'a.py'", "forbidden"),
    "yaml": (lambda c: member("a.yaml", b"!!python/object/apply:os.abort []"), "'a.yaml'", None),
}


@contextmanager
def bounded_memory():
    """Compare the peak of this process's memory with what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = memory_bytes("VmRSS")
    yield
    peak = memory_bytes("VmHWM") - before
    assert peak < PEAK_BYTES, f"{peak / MIB:.0f} MiB"


def memory_bytes(name):
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) * 1024


def test_memory_is_measured():
    with pytest.raises(AssertionError, match="MiB"), bounded_memory():
        bytearray(b"x") * (PEAK_BYTES + MIB)


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def index_and_read(folder):
    """What a user does with shards of others: index them, then read every record."""
    index.run(IndexConfig(shards=[f"{folder}/*.tar"]))
    for url, shard in resolve_source([str(folder)]):
        for segment in shard.segments:
            read_all(url, segment)


def read_all(url, segment):
    records = read_segment(url, segment, fields={}, source="s", max_chars=200_000)
    for number in range(len(records)):
        records.record(number)


@pytest.mark.parametrize("name", CASES)
def test_poison_is_refused(tmp_path, monkeypatch, name):
    make, part, kind = CASES[name]
    folder, canary = tmp_path / "shards", tmp_path / "canary"
    folder.mkdir()
    data = make(canary)
    (folder / "x.tar").write_bytes(data + bytes(1024))
    monkeypatch.chdir(tmp_path)
    allowed = ["shards", "shards/x.tar"]

    with bounded_memory(), pytest.raises(UserError) as caught:
        index_and_read(folder)
    check(caught.value, part, kind)
    assert set(everything_below(tmp_path)) - {"shards/index.json"} == set(allowed)

    # An index that a stranger made along with them, with the right checksum, protects from nothing.
    with bounded_memory(), pytest.raises(DataError) as caught:
        read_all(str(folder / "x.tar"), Segment(0, len(data), 1, zlib.crc32(data)))
    check(caught.value, part, None)
    assert set(everything_below(tmp_path)) - {"shards/index.json"} == set(allowed)


def check(error, part, kind):
    message = str(error)
    assert "x.tar" in message
    assert "\n" not in message
    assert len(message) < 2000
    assert part in message
    assert kind is None or error.kind == kind


def test_the_payload_would_run(tmp_path):
    """The canary is a real one: what unpickles it makes it."""
    from multiprocessing.reduction import ForkingPickler

    ForkingPickler.loads(pickled(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
