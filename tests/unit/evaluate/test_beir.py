import gzip
import json

import pytest
import zstandard

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, load_retrieval_set, save_retrieval_set

SMALL = RetrievalSet(
    "small",
    {"d1": "  outer space \n and lines", "d2": "", "ä 3": "line\u2028separator"},
    {"q1": "one", "q2": "two", "q3": "not judged"},
    {"q1": {"d1": 2, "ä 3": 0}, "q2": {"d2": 1}},
)


def write(folder, corpus, queries, qrels, split="test"):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in queries))
    (folder / "qrels" / f"{split}.tsv").write_text(qrels)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path / "set",
        [{"_id": "d1", "title": "A title", "text": "a text"}, {"_id": 2, "title": "", "text": "b"}],
        [{"_id": "q1", "text": "one", "metadata": {}}, {"_id": "q2", "text": "two"}],
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\t2\t2\nq2\td1\t0\n",
    )


def test_reads_titles_and_judgments(folder):
    assert load_retrieval_set(folder) == RetrievalSet(
        "set",
        {"d1": "A title a text", "2": "b"},
        {"q1": "one", "q2": "two"},
        {"q1": {"d1": 1}, "q2": {"2": 2, "d1": 0}},
    )
    assert load_retrieval_set(folder, name="other").name == "other"


@pytest.mark.parametrize(
    "text", ["q1\td1\t1\nq2\t2\t2\n", "q1 0 d1 1\nq2 0 2 2\n", "q1\t0\td1\t1\r\nq2\t0\t2\t2"]
)
def test_reads_qrels_without_header_and_in_trec_form(folder, text):
    (folder / "qrels" / "test.tsv").write_text(text)
    assert load_retrieval_set(folder).qrels == {"q1": {"d1": 1}, "q2": {"2": 2}}


def test_round_trip_with_the_same_bytes(tmp_path):
    save_retrieval_set(SMALL, tmp_path / "a")
    read = load_retrieval_set(tmp_path / "a", name="small")
    assert read == SMALL
    save_retrieval_set(read, tmp_path / "b")
    names = ["corpus.jsonl", "qrels/test.tsv", "queries.jsonl"]
    written = (p for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert sorted(p.relative_to(tmp_path / "b").as_posix() for p in written) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)]
)
def test_reads_compressed_files_and_a_byte_order_mark(folder, ending, compress):
    expected = load_retrieval_set(folder)
    for path in [*folder.glob("*.jsonl"), *folder.glob("qrels/*")]:
        path.with_name(f"{path.name}.{ending}").write_bytes(
            compress(b"\xef\xbb\xbf" + path.read_bytes())
        )
        path.unlink()
    assert load_retrieval_set(folder) == expected
    path = folder / f"corpus.jsonl.{ending}"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=rf"jsonl\.{ending} cannot be read: .*; get it again"):
        load_retrieval_set(folder)


def test_a_split_is_chosen_and_missing_ones_are_listed(folder):
    (folder / "qrels" / "dev.tsv").write_text("q1\t2\t1\n")
    assert load_retrieval_set(folder, split="dev").qrels == {"q1": {"2": 1}}
    with pytest.raises(UserError, match=r"no split 'train'; its splits are dev, test"):
        load_retrieval_set(folder, split="train")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_names_what_is_missing_or_empty(folder, name):
    (folder / name).write_text("\n")
    with pytest.raises(UserError, match=f"{name} is empty"):
        load_retrieval_set(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no (corpus|queries|qrels/)"):
        load_retrieval_set(folder)


def test_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_retrieval_set(tmp_path / "absent")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"_id": "x", "text": "cut', "not JSON"),
        (b'["x", "text"]', "a list where an object"),
        (b'{"text": "no id"}', "_id is None"),
        (b'{"_id": true, "text": ""}', "_id is True"),
        (b'{"_id": "", "text": ""}', "_id is ''"),
        (b'{"_id": "x"}', "no field 'text'; there are ['_id']"),
        (b'{"_id": "x", "text": null}', "text is None"),
        (b'{"_id": "x", "text": "", "title": 3}', "title is 3"),
        (b"[" * 100_000, "not JSON"),
        (b'{"_id": "d1", "text": "again"}', "'d1' occurs twice"),
        (b'{"_id": "x", "text": "\xff"}', "not UTF-8"),
        (b'{"_id": "x", "text": "\\ud800"}', "surrogate"),
    ],
)
def test_names_the_line_of_a_bad_text(folder, line, message):
    path = folder / "corpus.jsonl"
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(UserError, match="line 4") as caught:
        load_retrieval_set(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td1", "line 5: 2 columns"),
        ("q1\td1\thigh", "line 5: the score 'high'"),
        ("q1\td1\t2", "line 5: document 'd1' is judged 1 and 2"),
        ("q9\td1\t2", "names 1 queries that are not in queries.jsonl ('q9')"),
        ("q1\td7\t1\nq1\td8\t1\nq1\td9\t1\nq2\td6\t1", "4 documents that are not in corpus.jsonl"),
    ],
)
def test_names_the_line_of_a_bad_judgment(folder, line, message):
    path = folder / "qrels" / "test.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError) as caught:
        load_retrieval_set(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {}}, "has no documents"),
        ({"queries": {}}, "has no queries"),
        ({"qrels": {}}, "has no judgments"),
        ({"qrels": {"q9": {"d1": 1}}}, "1 queries that are not in"),
        ({"qrels": {"q1": {"d9": 1}}}, "1 documents that are not in"),
        ({"queries": {"q\t1": "x"}, "qrels": {"q\t1": {"d1": 1}}}, "holds a tab"),
        ({"queries": {"q1\n": "x"}, "qrels": {"q1\n": {"d1": 1}}}, "a line break"),
    ],
)
def test_writes_nothing_that_could_not_be_read_back(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        save_retrieval_set(SMALL._replace(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
