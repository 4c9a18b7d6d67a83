import csv
import gzip
import json

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from largebatch.curate.rows import find_inputs, read_rows
from largebatch.errors import UserError

ROWS = [
    {"query": "q1 ü", "document": 'd1, "quoted"\nand broken'},
    {"query": "q2", "document": "d\t2"},
    {"query": "q3", "document": "x" * 200_000},
]


def jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter, path, rows=ROWS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def read(*patterns, split="train", on_bytes=lambda _: None):
    return [
        dict(row.fields)
        for source in find_inputs([str(pattern) for pattern in patterns])
        for row in read_rows(source, split=split, on_bytes=on_bytes)
    ]


@pytest.fixture
def make(tmp_path):
    def make_file(name):
        path = tmp_path / name
        kind, _, compression = name.partition(".")[2].partition(".")
        if kind == "jsonl":
            path.write_bytes(jsonl())
        elif kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        else:
            table("\t" if kind == "tsv" else ",", path)
        if compression == "gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        elif compression == "zst":
            data = path.read_bytes()
            frames = [zstandard.compress(data[:9]), zstandard.compress(data[9:])]
            path.write_bytes(b"".join(frames))
        return path

    return make_file


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.csv",
        "a.csv.gz",
        "a.tsv",
        "a.tsv.zst",
        "a.parquet",
    ],
)
def test_every_kind_of_file_gives_its_rows_and_tells_its_bytes(make, name):
    path = make(name)
    num_bytes = []
    assert read(path, on_bytes=num_bytes.append) == ROWS
    assert abs(sum(num_bytes) - path.stat().st_size) <= 1
    assert find_inputs([str(path)])[0].name == "a"


def test_inputs_keep_their_order_and_globs_are_sorted(make, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        make(name)
    inputs = find_inputs([str(tmp_path / "c.csv"), str(tmp_path / "*.jsonl")])
    assert [source.name for source in inputs] == ["c", "a", "b"]


def test_byte_order_marks_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]) + b"\n  \n" + jsonl(ROWS[1:]).rstrip(b"\n"))
    assert read(path) == ROWS
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfquery,document\r\nq,d\r\n\r\n")
    assert read(path) == [{"query": "q", "document": "d"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", jsonl() + b"{", r"a\.jsonl, line 4 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1 holds list"),
        ("a.jsonl", jsonl() + b"\n{\xff}\n", r"a\.jsonl, line 5 is not UTF-8.* byte 1 of the line"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl.gz", gzip.compress(jsonl())[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", zstandard.compress(jsonl())[:-9], r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
        ("a.csv", b"", "line of field names"),
        ("a.csv", b"a,a\n1,2\n", "line of field names"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, and the first line names 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 2: unexpected end of data"),
        ("a.csv", b"a,b\n1,2\n1,\xff\n", "line 3 is not UTF-8"),
        ("a.parquet", b"PAR1 no", r"a\.parquet, after row 0, cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_unknown_inputs_are_refused(tmp_path):
    for name in ("a.txt", "a.json", "a.zst"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"unknown kind; known are \.jsonl, \.csv"):
            find_inputs([str(tmp_path / name)])
    with pytest.raises(UserError, match="matches no file"):
        find_inputs([str(tmp_path / "*.csv")])
    with pytest.raises(UserError, match="needs a name"):
        find_inputs(["hf:"])


def test_hugging_face_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    rows = [{"query": "q", "positive_passages": [{"docid": "1", "title": "t", "text": "d"}]}] * 3
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select([0])}).save_to_disk(
        tmp_path / "many"
    )
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    assert read(tmp_path / "one") == rows
    assert read(tmp_path / "many") == rows
    assert read(tmp_path / "many", split="dev") == rows[:1]
    assert read(tmp_path / "folder") == rows
    with pytest.raises(UserError, match="no split 'test'; it has train, dev"):
        read(tmp_path / "many", split="test")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "folder", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty, after row 0, cannot be read"):
        read(tmp_path / "empty")


def test_folders_in_beir_layout(tmp_path):
    (tmp_path / "qrels").mkdir()
    texts = [{"_id": "d1", "title": "t", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
    (tmp_path / "corpus.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "queries.jsonl").write_bytes(jsonl([{"_id": "q1", "text": "what"}]))
    # One of the judged documents is not in the corpus, as in some published sets.
    judgments = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t0\nq1\tgone\t1\n"
    (tmp_path / "qrels/train.tsv").write_text(judgments)
    assert read(tmp_path) == [{"query": "what", "document": "two", "id": "q1:d2"}]
