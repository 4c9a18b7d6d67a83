import gc
import hashlib
import json
import tarfile
import textwrap
import warnings
from pathlib import Path

import pytest
import webdataset as wds
import zstandard

from largebatch.errors import DataError, UserError
from largebatch.shards import packed
from largebatch.shards.find import resolve_source
from largebatch.shards.index import (
    MAX_SEGMENT_BYTES,
    RecordSpan,
    Segment,
    SegmentTable,
    ShardIndex,
    cut_segments,
)
from largebatch.shards.records import Record
from largebatch.shards.segment import read_segment
from largebatch.shards.write import ShardWriter
from largebatch.stores import remote
from largebatch.stores.locations import read_bytes


def make_records(number):
    return [
        Record(
            f"query {i} ü", f"document {i} " + "x" * (i % 700), [f"n{i}"] * (i % 3), "src", f"id{i}"
        )
        for i in range(number)
    ]


def write(folder: Path, records, *, records_per_shard=1000, extra=None, layout="packed"):
    with ShardWriter(folder, records_per_shard=records_per_shard, layout=layout) as writer:
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


@pytest.fixture(scope="module", params=["packed", "samples"])
def shards(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, make_records(2600), records_per_shard=2100, layout=request.param)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write(folder, make_records(2600), records_per_shard=2100, layout="samples")
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


def test_plain_webdataset_reads_our_shards(samples):
    urls = [str(samples / name) for name in ("shard-000000.tar", "shard-000001.tar")]
    stages = (wds.SimpleShardList(urls), wds.tarfile_to_samples(), wds.decode())
    rows = collect(wds.DataPipeline(*stages, wds.to_tuple("__key__", "json")))
    assert [key for key, _ in rows] == [f"{i:09d}" for i in range(2600)]
    for (_, content), record in zip(rows, make_records(2600), strict=True):
        assert Record(**({"negatives": []} | content)) == record


def test_a_plain_webdataset_pipeline_reads_packed_shards(tmp_path):
    """The lines of the docstring that say how."""
    write(tmp_path, make_records(2600), records_per_shard=2100)
    urls = [f"{tmp_path}/shard-{{000000..000001}}.tar"][0]
    code = textwrap.dedent(packed.__doc__.partition("more:\n\n")[2])
    assert len([line for line in code.splitlines() if line]) == 5
    names = {"json": json, "zstandard": zstandard, "wds": wds, "urls": urls}
    exec(code, names)
    rows = collect(names["pairs"])
    assert [row["id"] for row in rows] == [f"id{i}" for i in range(2600)]


def test_the_usual_webdataset_line_reads_our_shards(samples):
    dataset = wds.WebDataset(str(samples / "shard-000001.tar"), shardshuffle=False).decode()
    assert [sample["json"]["id"] for sample in collect(dataset)] == [
        f"id{i}" for i in range(2100, 2600)
    ]


@pytest.mark.parametrize("layout", ["packed", "samples"])
def test_the_same_records_give_the_same_bytes(tmp_path, layout):
    extra = {"z": 1, "a": {"b": "ü"}}
    for name in ("a", "b"):
        write(tmp_path / name, make_records(50), records_per_shard=20, extra=extra, layout=layout)
    names = [f"shard-00000{i}.tar" for i in range(3)]
    assert visible(tmp_path / "a") == ["index.json", *names]
    for name in visible(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a/shard-000000.tar") as tar:
        member = tar.getmembers()[layout == "samples"]
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
            0,
            0,
            0,
            "",
            "",
        )
        content = tar.extractfile(member).read()
    if layout == "packed":
        content = zstandard.decompress(content).splitlines()[1]
    assert list(json.loads(content)) == ["query", "document", "negatives", "source", "id", "z", "a"]
    assert "ü".encode() in content


def test_segments_end_where_the_next_begins_and_are_bounded():
    big = MAX_SEGMENT_BYTES // 2
    ends = [1024, 1024 + big, 1024 + 2 * big, 1024 + 6 * big, 2048 + 6 * big]
    begins = [0, *ends[:-1]]
    segments = cut_segments(
        RecordSpan(begin, end, 1, False) for begin, end in zip(begins, ends, strict=True)
    )
    assert [s.num_records for s in segments] == [2, 1, 1, 1]
    assert [s.offset for s in segments] == [0, ends[1], ends[2], ends[3]]
    assert sum(s.num_bytes for s in segments) == ends[-1]
    assert cut_segments([]) == []


def test_a_packed_member_is_a_segment_of_its_own():
    spans = [RecordSpan(0, 1, 1, False), RecordSpan(1, 2, 5, True), RecordSpan(2, 3, 5, True)]
    spans += [RecordSpan(3, 4, 1, False), RecordSpan(4, 5, 1, False)]
    assert [s.num_records for s in cut_segments(spans)] == [1, 5, 5, 2]


def test_a_packed_member_is_bounded_in_bytes(tmp_path):
    big = Record("q", "d" * (MAX_SEGMENT_BYTES * 2 // 5), [], "s", "i")
    write(tmp_path, [big] * 5, records_per_shard=10)
    ((_, shard),) = resolve_source([str(tmp_path)])
    assert shard.segments.num_records.tolist() == [2, 2, 1]
    assert len(read([str(tmp_path)])) == 5


def test_a_table_of_segments_is_a_sequence_of_them_that_is_small():
    segments = [Segment(1024 * i, 1024, i % 7, i) for i in range(100)]
    table = SegmentTable.of(segments)
    assert list(table) == segments
    assert len(table) == 100
    assert table[3] == table[-97] == segments[3]
    assert table[2:5] == SegmentTable.of(segments[2:5])
    assert table != SegmentTable.of(segments[1:])
    assert (table.offsets[5], table.num_bytes[5], table.crc32[5]) == (5 * 1024, 1024, 5)
    assert table.num_records.nbytes * 4 == 3200
    with pytest.raises(IndexError):
        table[100]


def test_an_index_of_an_earlier_version_has_no_checksums(shards, tmp_path):
    content = json.loads((shards / "index.json").read_text())
    content["version"] = 1
    for shard in content["shards"]:
        assert all(segment.pop() >= 0 for segment in shard["segments"])
        (tmp_path / shard["file"]).symlink_to(shards / shard["file"])
    (tmp_path / "index.json").write_text(json.dumps(content))
    index = ShardIndex.load(tmp_path)
    assert [s.segments.crc32.tolist() for s in index.shards] == [[-1, -1, -1], [-1]]
    assert read([str(tmp_path)]) == make_records(2600)


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path, make_records(30), records_per_shard=10)
    before = {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    broken = [*make_records(12), Record("q", "d", [], "s", "\ud800")]
    with pytest.raises(UserError, match="does not fit into JSON"):
        write(tmp_path, broken, records_per_shard=5)
    assert {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)} == before
    assert not (tmp_path / ".partial").exists()


def test_a_tar_that_is_given_up_is_quiet_when_it_is_collected(tmp_path):
    broken = [*make_records(2), Record("q", "d", [], "s", "\ud800")]
    with pytest.raises(UserError, match="does not fit into JSON"):
        write(tmp_path, broken, records_per_shard=5, layout="samples")
    gc.collect()  # an error in __del__ is a warning, and so fails this test


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
        ({"x": "y" * 2**24}, "at most 16,777,216"),
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
        [f"{shards.parent}/{shards.name[:-1]}[{shards.name[-1]}]/shard-00000?.tar"],
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
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(UserError, match=r'it is a file, .*`largebatch shard "input=\[.*jsonl\]"'):
        resolve_source([str(tmp_path / "pairs.jsonl")])
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
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        resolve_source([str(tmp_path)])
    assert len(resolve_source([str(tmp_path)], check_present=False)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("shards"),
        lambda c: c.update(version=3),
        lambda c: c.update(num_records=31),
        lambda c: c["shards"][0].update(num_records=9),
        lambda c: c["shards"][0].update(file="../shard-000000.tar"),
        lambda c: c["shards"][1].update(file="shard-000000.tar"),
        lambda c: c["shards"][0].update(segments=[[0, 10**9, 10, 0]]),
        lambda c: c["shards"][0].update(segments=[[512, 512, 5, 0], [0, 512, 5, 0]]),
        lambda c: c["shards"][0].update(segments=[[-512, 512, 10, 0]]),
        lambda c: c["shards"][0].update(segments=[[0, 512, 10]]),
        lambda c: c["shards"][0].update(segments=[[0, 512, 10, 2**32]]),
        lambda c: c["shards"][0].update(segments=[[0, 512.5, 10, 0]]),
        lambda c: c["shards"][0].update(segments=[[0, 512, 5, 0], [2**62, 2**62, 5, 0]]),
        lambda c: c["shards"][0].update(segments=[]),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, change):
    write(tmp_path, make_records(30), records_per_shard=10)
    content = json.loads((tmp_path / "index.json").read_text())
    change(content)
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        resolve_source([str(tmp_path)])


def test_remote_shards_are_read_by_byte_range(shards, monkeypatch):
    reads = []

    def read_remote(url, start, end, *, retries):
        reads.append((url, start, end))
        return read_bytes(url.replace("s3://bucket", str(shards)), start, end)

    monkeypatch.setattr(remote, "read_remote", read_remote)
    for urls in (
        ["s3://bucket/"],
        ["s3://bucket/shard-*.tar"],
        ["s3://bucket/shard-00000{0,1}.tar"],
    ):
        reads.clear()
        assert [url for url, _ in resolve_source(urls)] == [
            "s3://bucket/shard-000000.tar",
            "s3://bucket/shard-000001.tar",
        ]
        assert reads == [("s3://bucket/index.json", 0, None)]  # and no request for each shard
    url, shard = resolve_source(["s3://bucket"])[1]
    reads.clear()
    assert len(read_segment(url, shard.segments[0], fields={}, source="")) == 500
    assert reads == [("s3://bucket/shard-000001.tar", 0, shard.segments[0].num_bytes)]
    with pytest.raises(UserError, match="lists no nope"):
        resolve_source(["s3://bucket/nope.tar"])
    with pytest.raises(DataError, match="is missing"):
        read_segment("s3://bucket/nope.tar", shard.segments[0], fields={}, source="")
