import datetime
import decimal
import gc
import json
import warnings

import pyarrow as pa
import pytest
import webdataset as wds
import zstandard
from pyarrow import parquet

from largebatch.config import ShardConfig
from largebatch.curate.convert import convert
from largebatch.curate.rows import find_inputs
from largebatch.errors import UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.index import ShardIndex
from largebatch.shards.records import Record
from largebatch.shards.segment import read_segment


def run(path, folder, *, on_row=lambda: None, **options):
    config = ShardConfig(input=[str(path)], output_dir=str(folder), **options)
    return convert(config, find_inputs(config.input), on_bytes=lambda _: None, on_row=on_row)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(folder):
    urls = [url for url, _ in resolve_source([str(folder)])]
    stages = (wds.SimpleShardList(urls), wds.tarfile_to_samples())
    # webdataset leaves the closing of its files to the garbage collector, which warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        rows = [
            json.loads(line)
            for sample in wds.DataPipeline(*stages)
            for line in zstandard.decompress(sample["jsonl.zst"]).splitlines()
        ]
        gc.collect()
    return rows


def records(folder):
    return [
        record
        for url, shard in resolve_source([str(folder)])
        for segment in shard.segments
        for record in read_segment(url, segment, fields={}, source="")
    ]


def test_rows_become_records_with_their_further_fields(tmp_path):
    rows = [
        {"key": 5, "q": "q1", "pos": ["d1", "other"], "bad": ["n"], "stars": 0.5, "source": "own"},
        {"key": 6, "q": "q2", "pos": ["d2"], "bad": [], "stars": None, "source": None},
    ]
    fields = {"query": "q", "document": "pos", "negatives": "bad", "id": "key"}
    counts = run(write(tmp_path / "my.jsonl.x.jsonl", rows), tmp_path / "out", fields=fields)
    assert counts.ignored_positives == 1
    assert records(tmp_path / "out") == [
        Record("q1", "d1", ["n"], "own", "5"),
        Record("q2", "d2", [], "my.jsonl.x", "6"),
    ]
    first, second = contents(tmp_path / "out")
    assert list(first) == ["query", "document", "negatives", "source", "id", "stars"]
    assert list(second) == ["query", "document", "source", "id", "stars", "input_source"]


def test_fields_that_would_be_mistaken_are_renamed(tmp_path):
    row = {"title": "q", "body": "d", "document": "x", "neg": ["n"], "negative_1": "m", "id": "i"}
    row |= {"hard": "h", "number": "7", "text": "t"}
    fields = {"query": "title", "document": "body", "negatives": "hard", "id": "number"}
    run(write(tmp_path / "a.jsonl", [row]), tmp_path / "out", source="given", fields=fields)
    assert records(tmp_path / "out") == [Record("q", "d", ["h"], "given", "7")]
    (content,) = contents(tmp_path / "out")
    assert content["input_document"] == "x"
    assert content["input_neg"] == ["n"]
    assert content["input_negative_1"] == "m"
    assert content["input_id"] == "i"
    assert content["text"] == "t"


def test_drops_are_counted_by_reason(tmp_path):
    pairs = [
        ("query", "document"),
        ("query", "document"),
        ("query", "other"),
        ("", "document"),
        (None, "document"),
        ("query", " \n"),
        ("qu", "document"),
        ("query", "d" * 101),
        ("query", "\u200b\u00a0"),
        ("\u00a0qu\u200b", "document"),
        ("quer", "ydocument"),
    ]
    rows = [{"query": query, "document": document} for query, document in pairs]
    rows.append({"query": "query", "document": "last", "negatives": ["n" * 101]})
    path = write(tmp_path / "a.jsonl", rows)
    seen = []
    counts = run(
        path, tmp_path / "out", min_chars=3, max_chars=100, on_row=lambda: seen.append(None)
    )
    dropped = {"empty": 4, "too_short": 2, "too_long": 2, "duplicate": 1, "no_positive": 0}
    assert (counts.rows, counts.written, counts.dropped) == (12, 3, dropped)
    assert len(seen) == 12
    assert dict(ShardIndex.load(tmp_path / "out").dropped) == {
        k: n for k, n in dropped.items() if n
    }
    # Ids without one of their own say which row of the input it was.
    assert [record.id for record in records(tmp_path / "out")] == ["a-1", "a-3", "a-11"]
    counts = run(path, tmp_path / "all", deduplicate=False, max_chars=200)
    assert (counts.written, counts.dropped["duplicate"]) == (8, 0)


def test_the_same_input_gives_the_same_bytes_in_numbered_shards(tmp_path):
    rows = [{"query": f"q{i}", "document": f"d{i}", "x": {"b": i, "a": 1}} for i in range(25)]
    path = write(tmp_path / "a.jsonl", rows)
    counts = run(path, tmp_path / "one", records_per_shard=10)
    run(path, tmp_path / "two", records_per_shard=10)
    names = ["index.json", *(f"shard-00000{i}.tar" for i in range(3))]
    assert sorted(p.name for p in (tmp_path / "one").iterdir() if p.name[0] != ".") == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    sizes = [(tmp_path / "one" / name).stat().st_size for name in names[1:]]
    assert (counts.num_shards, counts.num_bytes) == (3, sum(sizes))


def test_values_that_json_has_not(tmp_path):
    table = {"query": ["q"], "document": ["d"], "day": [datetime.date(2024, 5, 1)]}
    table |= {
        "price": [decimal.Decimal("1.50")],
        "bad": [float("nan")],
        "list": [[1.0, float("inf")]],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out")
    (content,) = contents(tmp_path / "out")
    assert (content["day"], content["price"]) == ("2024-05-01", "1.50")
    assert (content["bad"], content["list"]) == (None, [1.0, None])
    parquet.write_table(pa.table(table | {"image": [b"png"]}), tmp_path / "b.parquet")
    counts = run(tmp_path / "b.parquet", tmp_path / "other")
    assert contents(tmp_path / "other") == [content | {"source": "b", "id": "b-1"}]
    assert counts.unread_columns == ("image (binary)",)
    parquet.write_table(pa.table(table | {"label": [b"0"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"column 'label' is of type binary.* cast it to string"):
        run(tmp_path / "c.parquet", tmp_path / "graded")
    run(tmp_path / "c.parquet", tmp_path / "graded", fields={"grade": "none"})


def test_shards_that_are_there_stay_unless_told(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "document": "d"}])
    run(path, tmp_path / "out")
    with pytest.raises(UserError, match="overwrite=true"):
        run(path, tmp_path / "out")
    bad = write(tmp_path / "bad.jsonl", [{"query": "new", "document": "d"}, {"query": "q"}])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: no document is recognized"):
        run(bad, tmp_path / "out", overwrite=True)
    assert [record.query for record in records(tmp_path / "out")] == ["q"]
    good = write(tmp_path / "good.jsonl", [{"query": "new", "document": "d"}])
    run(good, tmp_path / "out", overwrite=True)
    assert [record.query for record in records(tmp_path / "out")] == ["new"]


def test_an_input_without_a_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "document": ""}])
    with pytest.raises(UserError, match=r"nothing is left to write of 1 rows .*, empty 1"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_files_numbered_alike_keep_their_ids_which_are_counted(tmp_path):
    for name in ("first", "second"):
        rows = [{"id": n, "query": f"q{n} {name}", "document": f"d{n} {name}"} for n in range(6)]
        write(tmp_path / f"{name}.jsonl", [*rows, {"query": f"no id {name}", "document": "d"}])
    counts = run(tmp_path / "*.jsonl", tmp_path / "out")
    assert counts.repeated_ids == (6, 12)
    found = [(record.source, record.id) for record in records(tmp_path / "out")]
    assert found == [
        (name, record_id)
        for name, last in (("first", "first-7"), ("second", "second-14"))
        for record_id in [*"012345", last]
    ]
    assert run(tmp_path / "first.jsonl", tmp_path / "one").repeated_ids == (0, 0)


def test_a_record_that_is_too_large_is_named_by_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("largebatch.shards.write.MAX_RECORD_BYTES", 100)
    rows = [{"id": 0, "query": "q", "document": "d"}, {"id": 0, "query": "q", "document": 99 * "d"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: record '0' takes 1\d\d bytes"):
        run(path, tmp_path / "out")


GRADED = [
    {"query": "q1", "document": "d1", "label": 1, "score": 0.9},
    {"query": "q2", "document": "d2", "label": 0, "score": 0.85},
    {"query": "q3", "document": "d3", "label": 2, "score": None},
    {"query": "q4", "document": "d4", "label": True, "score": "0.2"},
]


@pytest.mark.parametrize(
    ("positives", "queries"),
    [
        ({"label": "1"}, ["q1", "q4"]),
        ({"label": "0"}, ["q2"]),
        ({"score": ">=0.85"}, ["q1", "q2"]),
        ({"score": ">= 0.1", "label": ">=1"}, ["q1", "q4"]),
    ],
)
def test_positives_are_chosen_by_a_grade(tmp_path, positives, queries):
    path = write(tmp_path / "a.jsonl", GRADED)
    counts = run(path, tmp_path / "out", positives=positives)
    # The shards are read without another word: nothing in them grades the pairs any more.
    assert [record.query for record in records(tmp_path / "out")] == queries
    assert counts.dropped["no_positive"] == 4 - len(queries)
    assert {"input_label", "input_score"} <= set(contents(tmp_path / "out")[0])


def test_graded_rows_are_refused_or_taken_for_positives(tmp_path):
    path = write(tmp_path / "a.jsonl", GRADED)
    fields = {"query": "query", "document": "document"}
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: field 'score' grades the pair"):
        run(path, tmp_path / "out", fields=fields)
    run(path, tmp_path / "out", fields={"grade": "none"})
    assert len(records(tmp_path / "out")) == 4
    path = write(tmp_path / "b.jsonl", [{"query": "q", "document": "d", "label": 1}])
    run(path, tmp_path / "all")
    assert contents(tmp_path / "all")[0]["label"] == 1


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        ({"labl": "1"}, r"line 1: positives\.labl names no field of it \(did you mean 'label'"),
        ({"document": ">=1"}, r"line 1: field 'document' is 'd1' and no number"),
        ({"label": ">=one"}, r"positives\.label='>=one' must end with a number"),
        ({"label": "7"}, r"nothing is left .* no_positive 4"),
    ],
)
def test_a_choice_of_positives_that_means_nothing_is_told(tmp_path, positives, message):
    path = write(tmp_path / "a.jsonl", GRADED)
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", positives=positives)


def test_a_score_that_is_not_there_reaches_no_bound(tmp_path):
    (tmp_path / "a.csv").write_text("query,document,score\na,b,0.9\nc,d,\n")
    counts = run(tmp_path / "a.csv", tmp_path / "csv", positives={"score": ">=0.8"})
    assert (counts.written, counts.dropped["no_positive"]) == (1, 1)
    rows = [{"query": "a", "document": "b", "score": score} for score in (0.9, None)]
    counts = run(write(tmp_path / "a.jsonl", rows), tmp_path / "out", positives={"score": ">=0.8"})
    assert (counts.written, counts.dropped["no_positive"]) == (1, 1)


@pytest.mark.parametrize("name", ["is_duplicate", "relevance", "cosine_similarity", "isDuplicate"])
@pytest.mark.parametrize(
    "options", [{"positives": {"NAME": "0"}}, {"fields": {"grade": "none"}}], ids=str
)
def test_shards_of_chosen_rows_need_no_option(tmp_path, name, options):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "document": "d", name: 0}])
    named = {
        option: {key.replace("NAME", name): value for key, value in of.items()}
        for option, of in options.items()
    }
    run(path, tmp_path / "out", **named)
    assert [record.query for record in records(tmp_path / "out")] == ["q"]
    assert contents(tmp_path / "out")[0][f"input_{name}"] == 0


def test_two_choices_of_positives_are_told(tmp_path):
    with pytest.raises(UserError, match=r"fields\.grade=score is not looked at beside positives"):
        run(tmp_path, tmp_path / "out", positives={"label": "1"}, fields={"grade": "score"})


def test_an_unknown_role_of_a_field_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", GRADED)
    with pytest.raises(UserError, match=r"fields\.quiry means nothing.*did you mean 'query'"):
        run(path, tmp_path / "out", fields={"quiry": "query"})


def test_blank_positives_count_as_none(tmp_path):
    rows = [{"query": "a", "pos": ["", "z", " ", "y"]}, {"query": "b", "pos": ["\u200b"]}]
    counts = run(write(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert (counts.written, counts.ignored_positives, counts.dropped["empty"]) == (1, 1, 1)
    assert records(tmp_path / "out")[0].document == "z"


def test_a_set_of_similarities_keeps_its_rows_with_their_labels(tmp_path):
    text = "sentence1\tsentence2\tscore\tgenre\na\tb\t5.0\tx\nc\td\t0.2\ty\n"
    (tmp_path / "sts.tsv").write_text(text)
    run(tmp_path / "sts.tsv", tmp_path / "out", fields={"label": "score"})
    first, second = contents(tmp_path / "out")
    assert (first["label"], second["label"]) == (5.0, 0.2)
    assert (second["query"], second["genre"]) == ("c", "y")
    assert "score" not in second
    # Who reads them without a need for labels is told that not all are positive pairs.
    with pytest.raises(UserError, match="field 'label' grades the pair"):
        records(tmp_path / "out")


def test_a_teachers_scores_are_kept_in_one_form(tmp_path):
    rows = [
        {"query": "q", "pos": ["d"], "neg": ["n", " ", "m"]}
        | {"pos_scores": [3], "neg_scores": [2, 9, 1], "prompt": "p"},
        {"query": "r", "pos": ["e"], "neg": ["k"], "pos_scores": None, "neg_scores": None},
    ]
    run(write(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [record.scores for record in records(tmp_path / "out")] == [[3.0, 2.0, 1.0], None]
    first, second = contents(tmp_path / "out")
    assert first["negatives"] == ["n", "m"]
    assert "pos_scores" not in first
    assert first["prompt"] == "p"
    assert second["pos_scores"] is None


def test_scores_of_something_else_are_put_aside(tmp_path):
    row = {"query": "q", "document": "d", "scores": [1, 2, 3]}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=r"'scores' holds 3 scores for 1 documents"):
        run(path, tmp_path / "out")
    run(path, tmp_path / "out", fields={"scores": "none"})
    assert contents(tmp_path / "out")[0]["input_scores"] == [1, 2, 3]
    assert records(tmp_path / "out")[0].scores is None
