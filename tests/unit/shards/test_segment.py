"""Segments: what is wrong with a record concerns it alone; with the bytes, the whole segment."""

import io
import json
import tarfile
import zlib
from multiprocessing.reduction import ForkingPickler

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from largebatch.errors import DataError
from largebatch.shards.index import Segment
from largebatch.shards.packed import pack
from largebatch.shards.records import Record
from largebatch.shards.segment import read_segment
from largebatch.shards.tar import iter_members, split_name


def tar_of(*members):
    """Bytes of a tar; a member is (name, contents) or a TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        return buffer.getvalue()[: tar.offset]


def read_tar(tmp_path, data, num_records=1, *, num_bytes=None, crc32=-1, **options):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    segment = Segment(0, num_bytes or len(data), num_records, crc32)
    return read_segment(str(path), segment, fields={}, source="s", **options)


PAIR = b'{"query": "q", "document": "d"}'


def test_samples_of_several_members(tmp_path):
    data = tar_of(
        ("dir.v1/a.query.txt", "q ü".encode()),
        ("dir.v1/a.document.TXT", b"d"),
        ("dir.v1/a.negative.1.txt", b"n1"),
        ("dir.v1/a.negative.0.txt", b"n0"),
        ("dir.v1/a.json", b'{"id": "i"}'),
        ("b.query.txt", b"q2"),
        ("b.txt", b"d2"),
    )
    first, second = read_tar(tmp_path, data, 2)
    assert first == Record("q ü", "d", ["n0", "n1"], "s", "i")
    assert second == Record("q2", "d2", [], "s", "x.tar:b")


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path):
    texts = tar_of(("a.query.txt", BOM + b"q"), ("a.document.txt", BOM + b"d"))
    assert next(iter(read_tar(tmp_path, texts)))[:2] == ("q", "d")
    assert next(iter(read_tar(tmp_path, tar_of(("a.json", BOM + PAIR)))))[:2] == ("q", "d")
    packed = tar_of(("a.jsonl.zst", pack([BOM + PAIR, PAIR])))
    assert [record.query for record in read_tar(tmp_path, packed, 2)] == ["q", "q"]
    with pytest.raises(DataError, match=r"is not UTF-8: .* at byte 516"):
        list(read_tar(tmp_path, tar_of(("a.json", BOM + b"{\xff"))))


@pytest.mark.parametrize("blank", ["", " \n", "\u00a0", "\u200b\ufeff \u3000"])
def test_a_blank_text_is_empty_and_a_blank_negative_is_none(tmp_path, blank):
    def read(**fields):
        row = {"query": "q", "document": "d"} | fields
        return next(iter(read_tar(tmp_path, tar_of(("a.json", json.dumps(row).encode())))))

    assert read(negatives=[blank, "n"]).negatives == ["n"]
    for side in ("query", "document"):
        with pytest.raises(DataError, match=f"has an empty {side}") as caught:
            read(**{side: blank})
        assert caught.value.kind == "empty"


@pytest.mark.parametrize(
    "name", ["v1.0.json", "dir/v1.0.query.txt", "a.b.c.jsonl.zst", "2024.01.02.json"]
)
def test_a_dot_in_a_key_is_told_as_what_it_is(tmp_path, name):
    with pytest.raises(DataError, match="has a dot in its key") as caught:
        read_tar(tmp_path, tar_of((name, PAIR)))
    key, extension = base_plus_ext(name)
    assert f"{key!r} is the key and {extension!r} the extension" in str(caught.value)
    assert caught.value.kind == "forbidden"


def test_long_names_and_folders(tmp_path):
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    names = ["folder/" + "ü" * 120 + ".json", "folder/" + "y" * 200 + ".json"]
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
            tar.addfile(folder)
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(PAIR)
                tar.addfile(info, io.BytesIO(PAIR))
            tar.addfile(folder)
            data = buffer.getvalue()[: tar.offset]
        assert [r.id for r in read_tar(tmp_path, data, 2)] == [f"x.tar:{n[:-5]}" for n in names]


def link(kind, name="a.json"):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "index.json"
    return info


def huge():
    info = tarfile.TarInfo("a.json")
    info.size = 2**40
    return info.tobuf()


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (tar_of(("a.json", PAIR), ("b.pkl", b"cos\nsystem\n.")), ["'b.pkl' at byte 1024", "KEY."]),
        (tar_of(("a.jpg", b"")), ["'a.jpg'", "allowed"]),
        (tar_of(("a.pyd.json.pyd", b"")), ["'a.pyd.json.pyd'"]),
        (tar_of(("nodot", b"")), ["'nodot'"]),
        (tarfile.TarInfo("\udcff.json").tobuf(), ["'\\udcff.json'", "not UTF-8"]),
        (tar_of(link(tarfile.SYMTYPE)), ["'a.json' at byte 0", "link"]),
        (tar_of(link(tarfile.LNKTYPE)), ["link"]),
        (tar_of(link(tarfile.CHRTYPE)), ["device"]),
        (tar_of(link(tarfile.FIFOTYPE)), ["device"]),
        (tar_of(("../../a.json", PAIR)), ["'../../a.json'", "leads out"]),
        (tar_of(("/etc/a.json", PAIR)), ["'/etc/a.json'", "leads out"]),
        (huge(), ["1,099,511,627,776 bytes", "67,108,864"]),
        (tar_of(("a.json", PAIR))[:700], ["cut off"]),
        (tar_of(("a.json", PAIR), ("b.json", PAIR))[:1224], ["no tar header at byte 1024"]),
        (tar_of(("a.json", PAIR)) + b"\1" * 512, ["no tar header at byte 1024"]),
        (tar_of(("a.json", PAIR)) + b"\0" * 512, ["ends before byte 1536"]),
        (b"\x1f\x8b" + b"\1" * 600, ["no tar header at byte 0", "compressed"]),
        (tar_of(("a.json", PAIR), ("b.json", PAIR)), ["2 records", "its index 1"]),
    ],
)  # fmt: skip
def test_poisoned_and_broken_segments_are_refused(tmp_path, data, parts):
    with pytest.raises(DataError) as caught:
        read_tar(tmp_path, data)
    message = str(caught.value)
    assert str(tmp_path / "x.tar") in message
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("layout", ["samples", "packed"])
@pytest.mark.parametrize(
    ("content", "kind", "parts"),
    [
        (b'{"query": "\xff"}', "undecodable", ["is not UTF-8: invalid start byte at byte"]),
        (b"{", "undecodable", ["is not JSON"]),
        (b"[" * 100_000, "undecodable", ["is not JSON"]),
        (b"[]", "undecodable", ["list instead of an object"]),
        (b'{"query": NaN, "document": "d"}', "undecodable", ["is not JSON"]),
        (b'{"query": "\\ud800", "document": "d"}', "undecodable", ["is not JSON", "surrogate"]),
        (b'{"id": 1%s, "query": "q", "document": "d"}' % (b"0" * 5000), "undecodable", ["number"]),
        (b'{"id": 1%s, "query": "q", "document": "d"}' % (b"0" * 50), "field", ["'id'"]),
        (b'{"query": "q"}', "field", ["no document is recognized"]),
        (b'{"query": 3, "document": "d"}', "field", ["'query' holds a number"]),
        (b'{"query": "q", "document": "d", "query": "r"}', "field", ["'query' a second time"]),
        (b'{"query" : "q", "document": "d", "document" : "r"}', "field", ["a second time"]),
        (b'{"query": "q", "document": " \\n"}', "empty", ["'{id}' has an empty document"]),
        (b'{"query": "", "document": "d", "id": "i"}', "empty", ["'i' has an empty query"]),
        (b'{"query": "q", "document": "%s"}' % (b"d" * 101), "too_large", ["101 characters"]),
        (b'{"query": "q", "document": "d", "neg": ["%s"]}' % (b"n" * 101), "too_large", ["101"]),
        (b'{"query": "q", "document": "d", "x": "%s"}' % (b"y" * 2**24), "too_large", ["bytes"]),
    ],
)  # fmt: skip
def test_a_fault_of_a_record_is_its_own(tmp_path, layout, content, kind, parts):
    if layout == "samples":
        data = tar_of(("a.json", PAIR), ("b.json", content), ("c.json", PAIR))
        place, bad_id = "member 'b.json' at byte 1024", "x.tar:b"
    else:
        data = tar_of(("k.jsonl.zst", pack([PAIR, content, PAIR])))
        place, bad_id = "member 'k.jsonl.zst' at byte 0 (line 2)", "x.tar:k:2"
    records = read_tar(tmp_path, data, 3, max_chars=100)
    assert len(records) == 3
    assert [records.record(i)[:2] for i in (0, 2)] == [("q", "d")] * 2
    with pytest.raises(DataError) as caught:
        records.record(1)
    message = str(caught.value)
    assert caught.value.kind == kind
    assert "\n" not in message
    assert len(message) < 1000
    for part in [str(tmp_path / "x.tar"), place, *parts]:
        assert part.replace("{id}", bad_id) in message


def test_a_text_of_two_members_and_a_field_twice(tmp_path):
    data = tar_of(("a.json", PAIR), ("a.query.txt", b"q"), ("b.query.txt", b"\xff"))
    records = read_tar(tmp_path, data, 2)
    with pytest.raises(DataError, match=r"'a\.query\.txt' at byte 1024 .*'query' of sample 'a'"):
        records.record(0)
    with pytest.raises(DataError, match=r"'b\.query\.txt' at byte 2048 is not UTF-8: .* 2560"):
        records.record(1)


def test_records_that_the_texts_of_others_look_like_are_read(tmp_path):
    """Where keys can't be counted at once, they are counted exactly."""
    contents = [
        {"query": 'say {"query": 1}, "query": 2', "document": "d"},
        {"query": "q", "pos": [{"text": "d"}], "neg": [{"text": "n"}, {"text": "m"}]},
    ]
    lines = [json.dumps(content).encode() for content in contents]
    first, second = read_tar(tmp_path, tar_of(("k.jsonl.zst", pack(lines))), 2)
    assert first.query == contents[0]["query"]
    assert second[:3] == ("q", "d", ["n", "m"])


def test_changed_bytes_are_told_even_if_they_decode(tmp_path):
    data = tar_of(("a.json", PAIR), ("b.json", PAIR))
    crc32 = zlib.crc32(data)
    assert len(read_tar(tmp_path, data, 2, crc32=crc32)) == 2
    for bad, part in [
        (data.replace(b'"q"', b'"r"'), "every record in them still decodes"),
        (data[:1024] + data[1024:].replace(b"q", b"\xff"), "'b.json' at byte 1024 is not UTF-8"),
        (b"x" * len(data), "no tar header at byte 0"),
    ]:
        with pytest.raises(DataError) as caught:
            read_tar(tmp_path, bad, 2, crc32=crc32)
        message = str(caught.value)
        assert caught.value.kind == "changed"
        assert "x.tar has changed since it was indexed, between bytes 0 and 2048" in message
        assert part in message


def test_packed_records_have_ids_of_their_lines_and_members_are_segments(tmp_path):
    lines = [PAIR, b'{"query": "q", "document": "d", "id": 7}', PAIR]
    one = ("dir/k.JSONL.zst", pack(lines))
    assert [r.id for r in read_tar(tmp_path, tar_of(one), 3)] == [
        "x.tar:dir/k:1",
        "7",
        "x.tar:dir/k:3",
    ]
    with pytest.raises(DataError, match=r"'dir/k\.JSONL\.zst' at byte 0 is packed and shares"):
        read_tar(tmp_path, tar_of(one, ("a.json", PAIR)), 4)
    with pytest.raises(DataError, match=r"has 3 records .* its index 2"):
        read_tar(tmp_path, tar_of(one), 2)
    with pytest.raises(DataError, match=r"missing.*though the index") as caught:
        read_segment(str(tmp_path / "y.tar"), Segment(0, 512, 1), fields={}, source="s")
    assert caught.value.kind == "missing"


@pytest.mark.parametrize(
    "data",
    [
        tar_of(("a.json", PAIR), ("b.query.txt", b"q"), ("b.txt", b"d")),
        tar_of(("k.jsonl.zst", pack([PAIR, PAIR]))),
    ],
)
def test_records_cross_into_another_process_and_tell_their_memory(tmp_path, data):
    records = read_tar(tmp_path, data, 2)
    copy = ForkingPickler.loads(ForkingPickler.dumps(records))
    assert list(copy) == list(records)
    assert 100 < records.num_bytes < 1000
    with pytest.raises(IndexError):
        records.record(2)


def test_plain_webdataset_writes_what_we_read(tmp_path):
    """Its own writer gives each member a time with fractions, which takes a header more."""
    with wds.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for i in range(3):
            writer.write({"__key__": f"dir/{i}", "json": PAIR, "extra.txt": "ü".encode()})
    data = (tmp_path / "x.tar").read_bytes()
    members = list(iter_members(io.BytesIO(data), url="x"))
    assert [m.name for m in members[:2]] == ["dir/0.extra.txt", "dir/0.json"]
    assert [r.id for r in read_tar(tmp_path, data[: members[-1].end], 3)] == [
        f"x.tar:dir/{i}" for i in range(3)
    ]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab./J \n-é"), max_size=12))
def test_names_are_split_as_webdataset_does(name):
    key, extension = base_plus_ext(name)
    expected = (name, "") if key is None else (key, extension.lower())
    if "\n" not in name:  # Its pattern takes a line end for the end.
        assert split_name(name) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.sampled_from("abc/é-"), min_size=1, max_size=120).map(
                lambda name: f"x{name}.json"
            ),
            st.binary(max_size=1500),
            st.sampled_from([0, 7, 1.5]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(members, format_):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for name, data, mtime in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # Too long a name for USTAR.
                return
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    buffer.seek(0)
    found = list(iter_members(buffer, url="x"))
    assert [(m.name, m.offset, m.data_offset, m.num_bytes) for m in found] == expected


def test_a_header_with_one_bit_changed_is_not_believed(tmp_path):
    data = tar_of(("a.json", PAIR))
    for byte in (0, 3, 100, 124, 134, 156, 257, 300, 400):
        bad = bytearray(data)
        bad[byte] ^= 1
        with pytest.raises(DataError):
            read_tar(tmp_path, bytes(bad))


def test_a_shorter_file_than_indexed_is_refused(tmp_path):
    with pytest.raises(DataError, match="gave 1,024 bytes for the 2,048"):
        read_tar(tmp_path, tar_of(("a.json", PAIR)), num_bytes=2048)
