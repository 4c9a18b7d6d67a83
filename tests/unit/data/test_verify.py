import io
import json
import tarfile

import pytest

from largebatch.data.records import Record
from largebatch.data.segment import read_segment
from largebatch.data.shards import ShardIndex, ShardWriter, resolve_source
from largebatch.data.scan import PARTIAL_NAME, build_index, shard_files
from largebatch.data.verify import verify
from largebatch.errors import UserError


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    with ShardWriter(folder, records_per_shard=1200) as writer:
        for i in range(2500):
            writer.write(Record(f"q{i}", f"d{i}", [], "s", str(i)))
    return folder


def problems_of(folder, **fields):
    return verify(folder, fields=fields, on_bytes=lambda _: None)


def index_of(*paths):
    return build_index(paths, on_bytes=lambda _: None)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_an_index_made_from_the_shards_is_the_one_written_with_them(shards):
    num_bytes = []
    paths = shard_files([f"{shards}/*.tar"])
    assert build_index(paths, on_bytes=num_bytes.append) == ShardIndex.load(shards)
    assert sum(num_bytes) == sum(path.stat().st_size for path in paths)


def test_shards_of_others_are_indexed_without_splitting_samples(tmp_path):
    path = tmp_path / "x.tar"
    members = [
        (f"{'dir/' * 30}{i}.{side}.txt", f"{side} {i}".encode())
        for i in range(1500)
        for side in ("query", "document")
    ]
    write_tar(path, members)
    index_of(path).save(tmp_path)
    (url, shard) = resolve_source([str(tmp_path)])[0]
    assert [segment.num_records for segment in shard.segments] == [1000, 500]
    records = read_segment(url, shard.segments[1], fields={}, source="s")
    assert records[0] == Record("query 1000", "document 1000", [], "s", f"x.tar:{'dir/' * 30}1000")
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
    with pytest.raises(UserError, match="is no file"):
        shard_files([f"{tmp_path}/y.tar"])
    with pytest.raises(UserError, match="no shards are given"):
        shard_files([])


def test_good_shards_have_no_problems(shards):
    assert problems_of(shards) == []
    assert problems_of(shards, query="document", document="query") == []


def test_all_problems_are_reported(shards):
    (shards / "shard-000000.tar").unlink()
    with (shards / "shard-000001.tar").open("r+b") as file:
        file.seek(512)
        file.write(b'{"query": "\xff')
    with (shards / "shard-000002.tar").open("ab") as file:
        file.write(b"more")
    (shards / "other.tar").touch()
    problems = problems_of(shards)
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
    assert len(problems) == 5, "one for each segment"
    assert "fields.document='body' is not among its fields" in problems[0]


def test_empty_texts_are_reported(tmp_path):
    with ShardWriter(tmp_path, records_per_shard=10) as writer:
        writer.write(Record("q", "d", [], "s", "good"))
        writer.write(Record("q", " ", [], "s", "bad"))
    (problem,) = problems_of(tmp_path)
    assert "1 records have an empty query or document (first: 'bad')" in problem


def test_segments_that_miss_records_are_reported(shards):
    index = json.loads((shards / "index.json").read_text())
    segments = index["shards"][0]["segments"]
    assert [segment[2] for segment in segments] == [1000, 200]
    whole = segments[1]
    # The same number of records, but the second segment ends a sample early.
    segments[1] = [whole[0], whole[1] - 1024, whole[2]]
    (shards / "index.json").write_text(json.dumps(index))
    (problem,) = problems_of(shards)
    assert "do not hold all of its records" in problem
    # The same records, cut elsewhere, are as good.
    segments[:] = [[0, whole[0] + whole[1], 1200]]
    (shards / "index.json").write_text(json.dumps(index))
    assert problems_of(shards) == []


def test_an_index_without_records_is_a_problem(tmp_path):
    ShardIndex(()).save(tmp_path)
    assert problems_of(tmp_path) == [f"{tmp_path / 'index.json'} lists no records"]
