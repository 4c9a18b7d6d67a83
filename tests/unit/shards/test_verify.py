import io
import json
import os
import tarfile

import pytest

from largebatch.errors import DataError, UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.index import ShardIndex
from largebatch.shards.packed import pack
from largebatch.shards.records import Record
from largebatch.shards.scan import PARTIAL_NAME, build_index, shard_files
from largebatch.shards.segment import read_segment
from largebatch.shards.verify import verify
from largebatch.shards.write import ShardWriter


@pytest.fixture(params=["packed", "samples"])
def shards(tmp_path, request):
    return write_shards(tmp_path / "shards", request.param)


@pytest.fixture
def samples(tmp_path):
    return write_shards(tmp_path / "samples", "samples")


def write_shards(folder, layout):
    with ShardWriter(folder, records_per_shard=1200, layout=layout) as writer:
        for i in range(2500):
            writer.write(Record(f"q{i}", f"d{i}", [], "s", str(i)))
    return folder


def problems_of(folder, **fields):
    return verify(folder, ShardIndex.load(folder), fields=fields, on_bytes=lambda _: None)


def index_of(*paths, **options):
    faults = []
    options = {"on_bytes": lambda _: None, "on_fault": faults.append} | options
    try:
        return build_index(paths, **options)
    finally:
        index_of.faults = faults


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_an_index_made_from_the_shards_is_the_one_written_with_them(shards):
    paths = shard_files([f"{shards}/*.tar"])
    written = ShardIndex.load(shards)
    for workers in (1, 2):
        num_bytes = []
        assert index_of(*paths, workers=workers, on_bytes=num_bytes.append) == written
        assert ShardIndex.load(shards) == written
        assert sum(num_bytes) == sum(path.stat().st_size for path in paths)
    assert written.shards[0].segments.crc32.min() >= 0


def test_an_index_that_was_stopped_is_gone_on_with(shards):
    paths = shard_files([f"{shards}/*.tar"])
    written = ShardIndex.load(shards)
    (shards / "index.json").unlink()
    good = paths[1].read_bytes()
    paths[1].write_bytes(b"x" * 512 + good[512:])
    with pytest.raises(DataError, match=r"shard-000001\.tar: no tar header"):
        index_of(*paths)
    assert not (shards / "index.json").exists()
    partial = shards / PARTIAL_NAME
    assert partial.read_bytes().count(b'"file"') == 2
    with partial.open("ab") as file:
        file.write(b'{"mtime_ns": 1, "sh')  # killed as it wrote
    # What is done is not read again, and what has changed since is.
    paths[1].write_bytes(good)
    stat = paths[0].stat()
    paths[0].write_bytes(b"x" * stat.st_size)
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    paths[2].write_bytes(paths[2].read_bytes())
    os.utime(paths[2], ns=(0, 0))
    num_bytes = []
    assert index_of(*paths, on_bytes=num_bytes.append) == written
    assert num_bytes[0] == stat.st_size
    assert sum(num_bytes) == sum(path.stat().st_size for path in paths)
    assert not partial.exists()


def test_every_shard_that_cannot_be_indexed_is_told_in_a_line(shards):
    paths = shard_files([f"{shards}/*.tar"])
    paths[0].write_bytes(b"\0" * 10240)
    paths[1].write_bytes(b"\x1f\x8b" + b"\1" * 600)
    with pytest.raises(UserError, match="2 of 3 shards can't be indexed"):
        index_of(*paths)
    first, second = index_of.faults
    assert first == f"{paths[0]} holds no samples; leave it out or delete it"
    assert second.startswith(f"{paths[1]}: no tar header at byte 0 (")
    assert "\n" not in second


def test_shards_of_both_layouts_in_one_tar_are_indexed(tmp_path):
    lines = [b'{"query": "q", "document": "d"}'] * 3
    members = [("a.json", lines[0]), ("b.json", lines[0]), ("c.jsonl.zst", pack(lines))]
    members += [("d.jsonl.zst", pack([])), ("e.jsonl.zst", pack(lines[:1])), ("f.json", lines[0])]
    write_tar(tmp_path / "x.tar", members)
    index = index_of(tmp_path / "x.tar")
    assert index.shards[0].segments.num_records.tolist() == [2, 3, 1, 1]
    assert problems_of(tmp_path) == []
    ((url, shard),) = resolve_source([str(tmp_path)])
    records = [r for g in shard.segments for r in read_segment(url, g, fields={}, source="s")]
    assert [r.id for r in records] == [
        f"x.tar:{name}" for name in ("a", "b", "c:1", "c:2", "c:3", "e:1", "f")
    ]


def test_shards_of_others_are_indexed_without_splitting_samples(tmp_path):
    path = tmp_path / "x.tar"
    members = [
        (f"{'dir/' * 30}{i}.{side}.txt", f"{side} {i}".encode())
        for i in range(1500)
        for side in ("query", "document")
    ]
    write_tar(path, members)
    index_of(path)
    (url, shard) = resolve_source([str(tmp_path)])[0]
    assert [segment.num_records for segment in shard.segments] == [1000, 500]
    records = read_segment(url, shard.segments[1], fields={}, source="s")
    assert records.record(0) == Record(
        "query 1000", "document 1000", [], "s", f"x.tar:{'dir/' * 30}1000"
    )
    assert problems_of(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no tar header at byte 0"),
        (b"\x1f\x8b" + b"\1" * 1000, "not compressed"),
        (b"\0" * 10240, "holds no samples"),
    ],
)
def test_files_that_are_no_shards_are_refused(tmp_path, data, message):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        index_of(tmp_path / "x.tar")


def test_cut_off_and_poisoned_shards_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.json", b"{}"), ("b.json", b"{}")])
    path.write_bytes(path.read_bytes()[:1537])
    with pytest.raises(UserError, match=r"x\.tar: no tar header at byte 2048"):
        index_of(path)
    write_tar(path, [("a.json", b"{}"), ("b.pkl", b"")])
    with pytest.raises(UserError, match=r"'b\.pkl' at byte 1024"):
        index_of(path)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**40
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match="claims"):
        index_of(path)


def test_files_to_index_lie_in_one_folder_of_this_machine(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", [("a.json", b"{}")])
    assert len(shard_files([f"{tmp_path}/a/*.tar", f"{tmp_path}/a/x.tar"])) == 1
    with pytest.raises(UserError, match="2 folders"):
        shard_files([f"{tmp_path}/*/x.tar"])
    with pytest.raises(UserError, match="remote"):
        shard_files(["s3://bucket/x.tar"])
    with pytest.raises(UserError, match="there is no such file or folder"):
        shard_files([f"{tmp_path}/y.tar"])
    with pytest.raises(UserError, match="no shards are given"):
        shard_files([])


def test_good_shards_have_no_problems(shards):
    assert problems_of(shards) == []
    assert problems_of(shards, query="document", document="query") == []


def test_shards_are_checked_by_several_processes(samples):
    (samples / "shard-000001.tar").unlink()
    index, fields = ShardIndex.load(samples), {"document": "body"}
    problems = verify(samples, index, fields=fields, workers=2, on_bytes=lambda _: None)
    assert [problem.partition(": ")[0].rpartition("/")[2] for problem in problems] == [
        "shard-000000.tar",
        "shard-000001.tar is missing",
        "shard-000002.tar",
    ]


def test_all_problems_are_reported(samples):
    (samples / "shard-000000.tar").unlink()
    with (samples / "shard-000001.tar").open("r+b") as file:
        file.seek(512)
        file.write(b'{"query": "\xff')
    with (samples / "shard-000002.tar").open("ab") as file:
        file.write(b"more")
    (samples / "other.tar").touch()
    problems = problems_of(samples)
    assert len(problems) == 6
    for part, problem in zip(
        [
            "shard-000000.tar is missing",
            "shard-000001.tar: sha256 is",
            "is not UTF-8: invalid start byte at byte 523",
            "shard-000002.tar: num_bytes is",
            "shard-000002.tar: sha256 is",
            "other.tar is not listed",
        ],
        problems,
        strict=True,
    ):
        assert part in problem


def test_records_without_the_fields_are_reported(shards):
    problems = problems_of(shards, document="body")
    assert len(problems) == 3, "one for each shard"
    assert "fields.document='body' is not among its fields" in problems[0]
    assert problems[0].endswith("(and 1,199 more records)")


def test_empty_texts_are_reported(tmp_path):
    with ShardWriter(tmp_path, records_per_shard=10) as writer:
        writer.write(Record("q", "d", [], "s", "good"))
        writer.write(Record("q", " ", [], "s", "bad"))
    (problem,) = problems_of(tmp_path)
    assert "member '000000000.jsonl.zst' at byte 0 (line 2): record 'bad' has an empty" in problem


def test_segments_that_miss_records_are_reported(samples):
    index = json.loads((samples / "index.json").read_text())
    segments = index["shards"][0]["segments"]
    assert [segment[2] for segment in segments] == [1000, 200]

    def problems():
        (samples / "index.json").write_text(json.dumps(index))
        return problems_of(samples)

    first, whole = segments
    # The same number of records, but the second segment ends a sample early.
    segments[1] = [whole[0], whole[1] - 1024, *whole[2:]]
    assert ["do not hold all of its records" in problem for problem in problems()] == [True]
    segments[:] = [first, [*whole[:3], whole[3] ^ 1]]
    assert ["crc32 of its segments" in problem for problem in problems()] == [True]
    # The same records, cut elsewhere, are as good.
    segments[:] = [[0, whole[0] + whole[1], 1200, 0]]
    assert problems() == []


def test_an_index_without_records_is_a_problem(tmp_path):
    ShardIndex(()).save(tmp_path)
    assert problems_of(tmp_path) == [f"{tmp_path / 'index.json'} lists no records"]


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_that_repeat_are_counted_over_all_shards_and_are_no_problem(tmp_path, workers):
    notes = []
    with ShardWriter(tmp_path, records_per_shard=10) as writer:
        for i in range(25):
            writer.write(Record(f"q{i}", f"d{i}", [], "s", str(i if i < 20 else i - 20)))
    found = verify(
        tmp_path,
        ShardIndex.load(tmp_path),
        fields={},
        workers=workers,
        on_bytes=lambda _: None,
        on_note=notes.append,
    )
    assert found == []
    (note,) = notes
    assert note.startswith("10 of 25 records have an id that others have too (ids that repeat: 5)")
    assert "data.sources.NAME.mask_same_id=true" in note


def test_graded_pairs_are_told_with_the_cure(tmp_path):
    rows = [{"query": f"q{i}", "document": "d", "label": i % 2} for i in range(6)]
    members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
    path = tmp_path / "a.tar"
    write_tar(path, members)
    index_of(path)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{path}: member '0.json' at byte 0: field 'label' grades the pair")
    assert "fields.grade=none" in problem
    assert problem.endswith("(and 2 more records)")
    assert problems_of(tmp_path, grade="none") == []
