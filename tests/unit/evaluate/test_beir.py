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
    "text",
    [
        "q1\td1\t1\nq2\t2\t2\n",
        "q1\td1\t1.0\nq2\t2\t2.0\n",  # the first line is a judgment, though its score has a point
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\t2\t2\n",
        "\nqid\tdocid\trel\nq1\td1\t1\nq2\t2\t2\n\n \n",
        "q1 d1 1\nq2 2 2",
        "q1 0 d1 1\nq2 0 2 2\n",
        "q1 Q0 d1 1\nq2 Q0 2 2\n",
        "q1\t0\td1\t1\r\nq2\t0\t2\t2",
        "query\titeration\tdocument\tlabel\r\nq1\t0\td1\t1\r\nq2\t0\t2\t2\r\n",
        "\ufeffq1\td1\t1\nq2\t2\t2",
        "q1\td1\t1\t\nq2\t2\t2\t\n",
    ],
)
def test_reads_qrels_in_all_their_forms(folder, text):
    (folder / "qrels" / "test.tsv").write_bytes(text.encode())
    assert load_retrieval_set(folder).qrels == {"q1": {"d1": 1}, "q2": {"2": 2}}


@pytest.mark.parametrize("score", ["high", "1,0"])
def test_a_first_line_of_a_known_query_is_no_header(folder, score):
    (folder / "qrels" / "test.tsv").write_text(f"q1\td1\t{score}\nq2\t2\t2\n")
    with pytest.raises(UserError, match=f"line 1: the score '{score}' is not a whole number"):
        load_retrieval_set(folder)


def test_what_published_sets_lack_or_repeat_is_told(folder, caplog):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(
            '{"_id": "2", "title": null, "text": "b"}\n{"_id": 3, "title": "c", "text": ""}\n'
        )
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tgone\t1\nq0\td1\t1\nq2\t2\t2\nq3\td1\t-1\n")
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q3", "text": "three"}\n')
    read = load_retrieval_set(folder)
    assert read.corpus == {"d1": "A title a text", "2": "b", "3": "c"}
    assert read.qrels == {"q1": {"d1": 1, "gone": 1}, "q2": {"2": 2, "d1": 0}, "q3": {"d1": -1}}
    assert [message.removeprefix(str(folder)) for message in caplog.messages] == [
        "/corpus.jsonl: 1 lines repeat an id and its text ('2')",
        "/qrels/test.tsv names 1 queries that are not in queries.jsonl ('q0'), of 4; their "
        "judgments are left out",
        "/qrels/test.tsv names 1 documents that are not in corpus.jsonl ('gone'), of 3; they count "
        "as not found",
        "/qrels/test.tsv: 1 of 3 queries have no relevant document; they count as 0",
    ]


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
        (b'{"_id": "d1", "text": "again"}', "'d1' occurs twice, with different texts"),
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
        ("q1\td1\t1.5", "line 5: the score '1.5' is not a whole number"),
        ("q1\td1\tnan", "line 5: the score 'nan'"),
        ("q1 d1\t1", "line 5: 2 columns"),
        ("q1\t\td1\t1", "line 5: 4 columns, 1 of them empty"),
        ("q1\td1\t1\t2021", "line 5: four columns, the second of which is 'd1' and not TREC's 0"),
        ("q1\t0\td1\t1\tx", "line 5: 5 columns"),
        ("query-id\tcorpus-id\tscore", "line 5: the score 'score'"),
        ("q7\td1\t2\nq8\td1\t2\nq9\td1\t2", "names 3 queries that are not in queries.jsonl"),
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
