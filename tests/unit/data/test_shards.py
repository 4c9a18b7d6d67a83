import gc
import hashlib
import io
import json
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import webdataset as wds
from fsspec.implementations.memory import MemoryFileSystem

from largebatch.data.index import MAX_SEGMENT_BYTES, cut_segments
from largebatch.data.records import Record
from largebatch.data.shards import Segment, ShardIndex, ShardWriter, read_segment, resolve_source
from largebatch.errors import UserError


def make_records(number):
    return [
        Record(
            f"query {i} ü", f"document {i} " + "x" * (i % 700), [f"n{i}"] * (i % 3), "src", f"id{i}"
        )
        for i in range(number)
    ]


def write(folder: Path, records, *, records_per_shard=1000, extra=None):
    with ShardWriter(folder, records_per_shard=records_per_shard) as writer:
        for record in records:
            writer.write(record, extra)


def read(urls, **options):
    options = {"fields": {}, "source": ""} | options
    return [
        record
        for url, shard in resolve_source(urls)
        for segment in shard.segments
        for record in read_segment(url, segment, **options)
    ]


def visible(folder: Path):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, make_records(2600), records_per_shard=2100)
    return folder


def test_round_trip_by_segments(shards):
    assert read([str(shards)]) == make_records(2600)
    index = ShardIndex.load(shards)
    assert [s.file for s in index.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert [[g.num_records for g in s.segments] for s in index.shards] == [[1000, 1000, 100], [500]]
    assert index.num_records == 2600
    for shard in index.shards:
        data = (shards / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)


def test_segments_are_read_alone_and_in_any_order(shards):
    url, shard = resolve_source([str(shards)])[0]
    read_last = read_segment(url, shard.segments[2], fields={}, source="other")
    assert [r.id for r in read_last] == [f"id{i}" for i in range(2000, 2100)]
    assert {r.source for r in read_last} == {"other"}


def collect(dataset):
    # webdataset leaves the closing of its file to the garbage collector, which warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        rows = list(dataset)
        gc.collect()
    return rows


def test_plain_webdataset_reads_our_shards(shards):
    urls = [str(shards / name) for name in ("shard-000000.tar", "shard-000001.tar")]
    stages = (wds.SimpleShardList(urls), wds.tarfile_to_samples(), wds.decode())
    rows = collect(wds.DataPipeline(*stages, wds.to_tuple("__key__", "json")))
    assert [key for key, _ in rows] == [f"{i:09d}" for i in range(2600)]
    for (_, content), record in zip(rows, make_records(2600), strict=True):
        assert Record(**({"negatives": []} | content)) == record


def test_the_usual_webdataset_line_reads_our_shards(shards):
    dataset = wds.WebDataset(str(shards / "shard-000001.tar"), shardshuffle=False).decode()
    assert [sample["json"]["id"] for sample in collect(dataset)] == [
        f"id{i}" for i in range(2100, 2600)
    ]


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(
            tmp_path / name, make_records(50), records_per_shard=20, extra={"z": 1, "a": {"b": "ü"}}
        )
    names = [f"shard-00000{i}.tar" for i in range(3)]
    assert visible(tmp_path / "a") == ["index.json", *names]
    for name in visible(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a/shard-000000.tar") as tar:
        member = tar.getmembers()[1]
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
            0,
            0,
            0,
            "",
            "",
        )
        content = tar.extractfile(member).read()
    assert list(json.loads(content)) == ["query", "document", "negatives", "source", "id", "z", "a"]
    assert "ü".encode() in content


def test_segments_end_where_the_next_begins_and_are_bounded():
    big = MAX_SEGMENT_BYTES // 2
    ends = [1024, 1024 + big, 1024 + 2 * big, 1024 + 6 * big, 2048 + 6 * big]
    segments = cut_segments(list(zip([0, *ends[:-1]], ends, strict=True)))
    assert [s.num_records for s in segments] == [2, 1, 1, 1]
    assert [s.offset for s in segments] == [0, ends[1], ends[2], ends[3]]
    assert sum(s.num_bytes for s in segments) == ends[-1]
    assert cut_segments([]) == ()


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path, make_records(30), records_per_shard=10)
    before = {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    broken = [*make_records(12), Record("q", "d", [], "s", "\ud800")]
    with pytest.raises(UserError, match="does not fit into JSON"):
        write(tmp_path, broken, records_per_shard=5)
    assert {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)} == before
    assert not (tmp_path / ".partial").exists()


def test_a_new_set_replaces_our_files_only(tmp_path):
    write(tmp_path, make_records(30), records_per_shard=10)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, make_records(5), records_per_shard=10)
    assert visible(tmp_path) == ["index.json", "notes.txt", "shard-000000.tar"]
    assert len(read([str(tmp_path)])) == 5


def test_shards_that_no_index_lists_are_not_overwritten(tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"shard-000000\.tar is there, and no index lists it"):
        write(tmp_path, make_records(1))
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"mine"


def test_two_writers_do_not_share_a_folder(tmp_path):
    with ShardWriter(tmp_path, records_per_shard=5) as writer:
        writer.write(make_records(1)[0])
        with pytest.raises(UserError, match="another process is writing"):
            write(tmp_path, make_records(1))
    assert len(read([str(tmp_path)])) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"query": 1}, "taken"),
        ({"x": b"bytes"}, "does not fit into JSON"),
        ({"x": float("nan")}, "does not fit into JSON"),
        ({"x": "\ud800"}, "does not fit into JSON"),
        ({"x": "y" * 2**26}, "at most 67,108,864"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, make_records(1), extra=extra)
    assert visible(tmp_path) == []


def test_urls_name_folders_braces_and_globs(shards, monkeypatch):
    both = [f"{shards}/shard-000000.tar", f"{shards}/shard-000001.tar"]
    for urls in (
        [str(shards)],
        [f"{shards}/"],
        [f"{shards}/shard-{{000000..000001}}.tar"],
        [f"{shards}/shard-*.tar"],
        [f"{shards.parent}/{shards.name[:-1]}[0-9]/shard-00000?.tar"],
        both,
    ):
        assert [Path(url).resolve() for url, _ in resolve_source(urls)] == [Path(b) for b in both]
    assert [url for url, _ in resolve_source([both[1]])] == [both[1]]
    monkeypatch.chdir(shards)
    assert len(read(["shard-000001.tar"])) == 500
    assert len(read(["."])) == 2600


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/nowhere", "no shards at .*nowhere: there is no such folder"),
        ("{}/nope-*.tar", r"no shards at .*nope-\*\.tar: nothing matches"),
        ("{}/shard-{{000000..000002}}.tar", r"lists no shard-000002\.tar"),
        ("{}/shard-{{0..1.tar", "braces that do not match"),
        ("pipe:cat {}/shard-000000.tar", "scheme 'pipe'"),
        ("ftp://{}/shard-000000.tar", "scheme 'ftp'"),
    ],
)
def test_urls_that_match_nothing(shards, url, message):
    with pytest.raises(UserError, match=message):
        resolve_source([url.format(shards)])


def test_a_shard_is_named_once(shards):
    with pytest.raises(UserError, match="named twice"):
        resolve_source([str(shards), f"{shards}/shard-000000.tar"])
    with pytest.raises(UserError, match="no urls"):
        resolve_source([])


def test_folders_without_index_or_records(tmp_path):
    with pytest.raises(UserError, match="largebatch index"):
        resolve_source([str(tmp_path)])
    ShardIndex(()).save(tmp_path)
    with pytest.raises(UserError, match="lists none"):
        resolve_source([str(tmp_path)])


def test_missing_and_changed_shards_are_named(tmp_path):
    write(tmp_path, make_records(30), records_per_shard=10)
    with (tmp_path / "shard-000001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(UserError, match=r"shard-000001\.tar has .* bytes.*largebatch index"):
        resolve_source([str(tmp_path)])
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        resolve_source([str(tmp_path)])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("shards"),
        lambda c: c.update(version=2),
        lambda c: c.update(num_records=31),
        lambda c: c["shards"][0].update(num_records=9),
        lambda c: c["shards"][0].update(file="../shard-000000.tar"),
        lambda c: c["shards"][1].update(file="shard-000000.tar"),
        lambda c: c["shards"][0].update(segments=[[0, 10**9, 10]]),
        lambda c: c["shards"][0].update(segments=[[512, 512, 5], [0, 512, 5]]),
        lambda c: c["shards"][0].update(segments=[[-512, 512, 10]]),
        lambda c: c["shards"][0].update(segments=[[0, 512]]),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, change):
    write(tmp_path, make_records(30), records_per_shard=10)
    content = json.loads((tmp_path / "index.json").read_text())
    change(content)
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        resolve_source([str(tmp_path)])


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


def read_tar(tmp_path, data, num_records=1, *, num_bytes=None):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    segment = Segment(0, num_bytes or len(data), num_records)
    return read_segment(str(path), segment, fields={}, source="s")


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
        (tar_of(("a.json", b'{"query": "\xff"}')), ["'a.json' is not UTF-8", "at byte 523"]),
        (tar_of(("a.json", b"{")), ["'a.json' at byte 0 is not JSON"]),
        (tar_of(("a.json", b"[" * 100_000)), ["is not JSON"]),
        (tar_of(("a.json", b"[]")), ["list instead of an object"]),
        (tar_of(("a.json", b'{"query": "q"}')), ["sample 'a'", "no document"]),
        (tar_of(("a.json", PAIR), ("a.query.txt", b"q")), ["'query' of sample 'a' a second time"]),
        (tar_of(("a.json", PAIR), ("b.json", PAIR)), ["2 records", "its index 1"]),
    ],
)  # fmt: skip
def test_poisoned_and_broken_shards_are_refused(tmp_path, data, parts):
    with pytest.raises(UserError) as caught:
        read_tar(tmp_path, data)
    message = str(caught.value)
    assert str(tmp_path / "x.tar") in message
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_shorter_file_than_indexed_is_refused(tmp_path):
    with pytest.raises(UserError, match="gave 1,024 bytes for the 2,048"):
        read_tar(tmp_path, tar_of(("a.json", PAIR)), num_bytes=2048)


class Bucket(MemoryFileSystem):
    protocol = "s3"
    reads = []  # noqa: RUF012

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.reads.append((path.rpartition("/")[2], start, end))
        return super().cat_file(path, start=start, end=end, **kwargs)


def test_remote_shards_are_read_by_byte_range(shards, monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    bucket = Bucket()
    for name in visible(shards):
        bucket.pipe_file(f"s3://bucket/{name}", (shards / name).read_bytes())
    for urls in (
        ["s3://bucket/"],
        ["s3://bucket/shard-*.tar"],
        ["s3://bucket/shard-00000{0,1}.tar"],
    ):
        assert [url for url, _ in resolve_source(urls)] == [
            "s3://bucket/shard-000000.tar",
            "s3://bucket/shard-000001.tar",
        ]
    url, shard = resolve_source(["s3://bucket"])[1]
    Bucket.reads.clear()
    assert len(read_segment(url, shard.segments[0], fields={}, source="")) == 500
    assert Bucket.reads == [("shard-000001.tar", 0, shard.segments[0].num_bytes)]
    with pytest.raises(UserError, match="lists no nope"):
        resolve_source(["s3://bucket/nope.tar"])
    with pytest.raises(UserError, match="is missing"):
        read_segment("s3://bucket/nope.tar", shard.segments[0], fields={}, source="")
