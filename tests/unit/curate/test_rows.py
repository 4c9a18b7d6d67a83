import csv
import gzip
import json
from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from largebatch.curate.rows import find_inputs, read_rows
from largebatch.data.tables import read_file, readable_columns
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


# A .tsv file holds no line ends and no tabs inside a text.
TSV_ROWS = [
    {"query": 'q1 "ü', "document": 'd1, "quoted"'},
    {"query": '"q2"', "document": "d\u20282"},
    {"query": "q3", "document": "x" * 200_000},
]


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
        if kind in ("jsonl", "ndjson", "jsonlines", "JSONL"):
            path.write_bytes(jsonl())
        elif kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        elif kind == "json":
            path.write_text(json.dumps(ROWS, indent=1))
        elif kind == "tsv":
            lines = ["query\tdocument", *("\t".join(row.values()) for row in TSV_ROWS)]
            path.write_text("\n".join(lines))
        else:
            table(",", path)
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
        "a.ndjson",
        "a.jsonlines",
        "a.JSONL",
        "a.json",
        "a.json.zst",
        "a.tsv",
        "a.tsv.zst",
        "a.parquet",
    ],
)
def test_every_kind_of_file_gives_its_rows_and_tells_its_bytes(make, name):
    path = make(name)
    num_bytes = []
    assert read(path, on_bytes=num_bytes.append) == (TSV_ROWS if ".tsv" in name else ROWS)
    assert abs(sum(num_bytes) - path.stat().st_size) <= 1
    assert find_inputs([str(path)])[0].name == "a"


def test_inputs_keep_their_order_and_globs_are_sorted(make, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        make(name)
    inputs = find_inputs([str(tmp_path / "c.csv"), str(tmp_path / "*.jsonl")])
    assert [source.name for source in inputs] == ["c", "a", "b"]


def test_a_blank_text_of_a_file_with_one_column_is_a_row(tmp_path):
    (tmp_path / "a.csv").write_text('text\na\n\n""\n \nb\n')
    assert [row["text"] for row in read(tmp_path / "a.csv")] == ["a", "", " ", "b"]
    (tmp_path / "a.tsv").write_text("text\na\n\n \nb\n")
    assert [row["text"] for row in read(tmp_path / "a.tsv")] == ["a", " ", "b"]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_may_have_the_separators_of_spreadsheets(tmp_path, separator):
    table(separator, tmp_path / "a.csv")
    assert read(tmp_path / "a.csv") == ROWS
    (tmp_path / "b.csv").write_text('"query, long";document\n"a;b";c\n')
    assert read(tmp_path / "b.csv") == [{"query, long": "a;b", "document": "c"}]


def test_lines_of_json_may_be_named_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\n" + jsonl())
    assert read(tmp_path / "a.json") == ROWS
    (tmp_path / "a.json").write_bytes(b"\n")
    assert read(tmp_path / "a.json") == []


def test_byte_order_marks_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]) + b"\n  \n" + jsonl(ROWS[1:]).rstrip(b"\n"))
    assert read(path) == ROWS
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf\r\nquery,document\r\nq,d\r\n \r\n")
    assert read(path) == [{"query": "q", "document": "d"}]
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfquery\tdocument\r\n\r\nq\td\r\n \r\n\t\n")
    assert read(path) == [{"query": "q", "document": "d"}, {"query": "", "document": ""}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", jsonl() + b"{", r"a\.jsonl, line 4: not JSON .* one object a line"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: a list where an object"),
        (
            "a.jsonl",
            jsonl() + b"\n{\xff}\n",
            r"a\.jsonl, line 5: not UTF-8.* byte 1 of the line.*; convert",
        ),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", gzip.compress(jsonl())[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", zstandard.compress(jsonl())[:-9], r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
        ("a.csv", b"", "line of field names"),
        ("a.tsv", b"\n", "line of field names"),
        ("a.csv", b"a,a\n1,2\n", "line 1 begins the file with 'a', 'a', which are no field names"),
        ("a.tsv", b"12\tq\n13\tr\n", "line 1 begins the file with '12', 'q', which are no"),
        ("a.tsv", b"q\t" + b"d" * 101 + b"\n", "line 1 begins the file with 'q', 'ddd.* names"),
        ("a.tsv", b"a\tb\n\n1\t2\t3\n", r"line 3 has 3 fields, and .* 2; in a \.tsv file tabs"),
        ("a.tsv", b'a\tb\n1\t"2\n3"\n', r"line 3 has 1 field, .* name the file \.csv"),
        ("a.tsv", b'a\tb\n1\t"say ""2"""\n', r"line 2 has fields .* quotes.* name the file \.csv"),
        ("a.tsv", b'"a"\t"b"\n', r"line 1 has fields .* quotes.* name the file \.csv"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, item 2: a int where an object"),
        ("a.json", b'[{"a": 1}', r"a\.json: not JSON"),
        ("a.json", b'{\n"a": 1}', r"a\.json, line 1: not JSON .* one array of objects"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, and the first line names 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 2: a quote is not closed until the end of the file"),
        ("a.csv", b'a,b\n1,"2" 3\n', "line 2: .*; put quotes around"),
        ("a.csv", b'a,b\n1,"2\n3"\n1\n', "line 4 has 1 field, and the first line names 2"),
        ("a.csv", b"a,b\n1,2\n1,\xff\n", "line 3: not UTF-8"),
        ("a.parquet", b"PAR1 no", r"a\.parquet, after row 0, cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_unknown_inputs_are_refused(tmp_path):
    for name in ("a.txt", "a.xml", "a.zst", "a", "a.parquet.gz", "a.jsonl.bz2"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"unknown kind; known are \.jsonl, \.json, \.csv"):
            find_inputs([str(tmp_path / name)])
    (tmp_path / "shards").mkdir()
    for name in ("index.json", "shard-000000.tar"):
        (tmp_path / "shards" / name).touch()
    with pytest.raises(UserError, match="shards holds shards, which are read by `train`"):
        find_inputs([str(tmp_path / "shards")])
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


def test_columns_that_become_no_json_are_not_read(tmp_path):
    table = pa.table({
        "query": ["q1", "q2"],
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "id": pa.array([b"1" * 16] * 2, pa.uuid()),
        "nanoseconds": pa.array([1700000000123456789] * 2, pa.timestamp("ns")),
        "clock": pa.array([1] * 2, pa.time64("ns")),
        "took": pa.array([1] * 2, pa.duration("ns")),
        "months": pa.array([(1, 1, 1)] * 2, pa.month_day_nano_interval()),
        "map": pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
        "image": pa.array([{"bytes": b"png", "path": "p"}] * 2),
        "raw": [b"x", b"y"],
        "half": pa.array([1.0] * 2, pa.float16()),
        "list": [[{"a": 1, "b": [Decimal("1.5")]}]] * 2,
        "day": [date(2024, 5, 1)] * 2,
        "at": pa.array([0] * 2, pa.timestamp("us", tz="UTC")),
        "zone": pa.array([0] * 2, pa.timestamp("us", tz="No/Such")),
    })  # fmt: skip
    parquet.write_table(table.drop_columns(["months"]), tmp_path / "a.parquet")
    expected = {"list": [{"a": 1, "b": [Decimal("1.5")]}], "day": date(2024, 5, 1)}
    expected["at"] = datetime(1970, 1, 1, tzinfo=UTC)
    for row, text in zip(read(tmp_path / "a.parquet"), ("a", "b"), strict=True):
        query = "q1" if text == "a" else "q2"
        assert row == {"query": query, "text": text} | expected
    unread = []
    read_columns = readable_columns(table.schema, "x", lambda _: (), unread.append)
    assert read_columns == ["query", "text", "list", "day", "at"]
    assert len(unread) == 10
    assert unread[1] == "nanoseconds (timestamp[ns])"


def test_a_needed_column_that_cannot_be_read_is_named(tmp_path):
    def rows(table):
        parquet.write_table(table, tmp_path / "a.parquet")
        return list(read_file(tmp_path / "a.parquet", needed=lambda names: ["document"]))

    with pytest.raises(UserError, match=r"a\.parquet: column 'document' is of type binary"):
        rows(pa.table({"document": [b"x"]}))
    far = pa.array([0] * 1500 + [2**60, 0], pa.timestamp("us"))
    with pytest.raises(UserError, match=r"a\.parquet, row 1501: column 'at' cannot be read: .*out"):
        rows(pa.table({"document": ["d"] * 1502, "at": far}))
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    with pytest.raises(UserError, match=r"row 1: column 'document' cannot be read: .*utf-8"):
        rows(pa.table({"document": bad}))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["document", "document"])
    with pytest.raises(UserError, match="several columns 'document'"):
        rows(twice)


def test_pictures_of_a_data_set_are_not_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"query": ["q"], "document": ["d"], "image": [{"bytes": b"no picture", "path": None}]}
    features = datasets.Features({
        "query": datasets.Value("string"),
        "document": datasets.Value("string"),
        "image": datasets.Image(),
    })  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [{"query": "q", "document": "d"}]
    (source,) = find_inputs([str(tmp_path / "one")])
    with pytest.raises(UserError, match="one: column 'image' is of type struct"):
        next(read_rows(source, split="", needed=lambda _: ["image"]))
    far = {"query": ["q"] * 3, "at": pa.array([0, 2**60, 0], pa.timestamp("us"))}
    datasets.Dataset(pa.table(far)).save_to_disk(tmp_path / "far")
    with pytest.raises(UserError, match=r"far, row 2: column 'at' cannot be read: date .* range"):
        read(tmp_path / "far")


def test_folders_in_beir_layout(tmp_path):
    (tmp_path / "qrels").mkdir()
    texts = [{"_id": "d1", "title": "t", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
    (tmp_path / "corpus.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "queries.jsonl").write_bytes(jsonl([{"_id": "q1", "text": "what"}]))
    # One of the judged documents is not in the corpus, as in some published sets.
    judgments = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t0\nq1\tgone\t1\n"
    (tmp_path / "qrels/train.tsv").write_text(judgments)
    assert read(tmp_path) == [{"query": "what", "document": "two", "id": "q1:d2"}]
