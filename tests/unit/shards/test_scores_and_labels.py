"""A teacher's scores and labels: the forms they come in, what is wrong with them, in shards."""

import math
from decimal import Decimal

import pytest

from largebatch.errors import DataError
from largebatch.shards.find import resolve_source
from largebatch.shards.records import record_from_mapping
from largebatch.shards.segment import read_segment
from largebatch.shards.write import ShardWriter

PAIR = {"query": "q", "document": "d"}
LABELLED = {"label": "auto"}
TRIPLET = {**PAIR, "negatives": ["n", "m"]}


def convert(mapping, **fields):
    return record_from_mapping(mapping, fields=fields, source="s", default_id="7", where="row 1")


@pytest.mark.parametrize(
    ("mapping", "fields"),
    [
        pytest.param({**TRIPLET, "scores": [3, 1.5, 0]}, {}, id="ours"),
        pytest.param({**TRIPLET, "teacher": [3, 1.5, 0]}, {"scores": "teacher"}, id="named"),
        pytest.param(
            {"query": "q", "pos": ["d"], "neg": ["n", "m"]}
            | {"pos_scores": [3.0], "neg_scores": [1.5, 0]},
            {},
            id="flagembedding",
        ),
        pytest.param(
            {"query": "q", "positive": "d", "negative_1": "n", "negative_2": "m"}
            | {"label": [3.0, 1.5, 0.0]},
            {},
            id="st-label",
        ),
        pytest.param({**TRIPLET, "score": [3.0, 1.5, 0.0]}, {}, id="st-score"),
        pytest.param({**TRIPLET, "scores": ["3", Decimal("1.5"), True * 0]}, {}, id="numbers"),
    ],
)
def test_forms_of_scores(mapping, fields):
    record = convert(mapping, **fields)
    assert (record.document, record.negatives, record.scores) == ("d", ["n", "m"], [3.0, 1.5, 0.0])
    assert record.label is None


def test_scores_of_texts_that_are_left_out_are_left_out():
    row = {"query": "q", "pos": [" ", "d", "e"], "neg": ["n", None, "", "m"]}
    numbers = {"pos_scores": [9, 3, 2], "neg_scores": [1.5, 8, None, 0]}
    assert convert(row | numbers)[1:3] == ("d", ["n", "m"])
    assert convert(row | numbers).scores == [3.0, 1.5, 0.0]
    # In one list the positives' come first.
    assert convert(row | {"scores": [9, 3, 2, 1.5, 8, math.nan, 0]}).scores == [3.0, 1.5, 0.0]
    # Null in a field of one text is a text that is left out.
    row = {**PAIR, "negative_1": None, "negative_2": "n"}
    assert convert(row | {"scores": [3, None, 1]}).scores == [3.0, 1.0]


@pytest.mark.parametrize(
    "mapping",
    [
        TRIPLET,
        {**TRIPLET, "scores": None},
        {**TRIPLET, "scores": 0.5},
        {**TRIPLET, "pos_scores": [1]},
        {**TRIPLET, "pos_scores": [], "neg_scores": []},
        {**TRIPLET, "pos_scores": None, "neg_scores": None},
        {**TRIPLET, "label": [0, 1]},  # by two people, perhaps
        {**PAIR, "labels": [1]},
        {**PAIR, "label": 1},
    ],
)
def test_what_is_no_scores_is_left_alone(mapping):
    assert convert(mapping).scores is None


@pytest.mark.parametrize(
    ("mapping", "fields", "parts"),
    [
        ({**TRIPLET, "scores": [1, 2]}, {}, ["'scores' holds 2 scores for 1 documents and 2 neg"]),
        ({**TRIPLET, "scores": [1, 2, 3, 4]}, {}, ["holds 4 scores", "fields.scores=none"]),
        ({**TRIPLET, "scores": [1, math.nan, 3]}, {}, ["'scores' holds 'nan'", "finite"]),
        ({**TRIPLET, "scores": [1, "inf", 3]}, {}, ["'scores' holds 'inf'", "finite"]),
        ({**TRIPLET, "scores": [1, None, 3]}, {}, ["holds null among its scores"]),
        ({**TRIPLET, "scores": [1, "high", 3]}, {}, ["holds 'high'"]),
        ({**TRIPLET, "scores": [1, [2], 3]}, {}, ["holds a list"]),
        ({**TRIPLET, "t": 0.5}, {"scores": "t"}, ["'t' holds a number", "list of numbers"]),
        ({**TRIPLET, "t": [1]}, {"scores": "u"}, ["fields.scores='u' is not among"]),
        (
            {**TRIPLET, "pos_scores": [1], "neg_scores": [2]},
            {},
            ["'pos_scores and neg_scores' holds 2 scores"],
        ),
        ({**PAIR, "score": "high"}, {"label": "score"}, ["'score' holds 'high'"]),
        ({**PAIR, "score": math.inf}, {"label": "score"}, ["'score' holds 'inf'", "finite"]),
        ({**PAIR, "score": math.nan}, {"label": "score"}, ["'score' holds 'nan'"]),
        ({**PAIR, "score": [1]}, {"label": "score"}, ["'score' holds a list"]),
        (
            {**PAIR, "relatedness": 1, "entailment_label": 2},
            {"label": "auto"},
            ["'relatedness', 'entailment_label'", "fields={label: relatedness}"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(mapping, fields, parts):
    with pytest.raises(DataError) as caught:
        convert(mapping, **fields)
    message = str(caught.value)
    assert message.startswith("row 1: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert caught.value.kind == "field"


def test_scores_that_mean_something_else_can_be_left_out():
    assert convert({**TRIPLET, "scores": [1]}, scores="none").scores is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"score": 0.25}, "score"),
        ({"score": "0.25"}, "score"),
        ({"label": 0.25, "score": 3}, "auto"),
        ({"similarity_score": Decimal("0.25")}, "auto"),
        ({"votes": 0.25, "label": 0}, "votes"),
    ],
)
def test_a_low_label_is_no_fault(row, name):
    assert convert(PAIR | row, label=name).label == 0.25


def test_a_label_is_looked_at_only_where_fields_say_so():
    with pytest.raises(DataError, match=r"grades the pair.* fields\.label to its name"):
        convert({**PAIR, "score": 0.25})
    assert convert({**PAIR, "score": 1}).label is None
    # Another field may still grade the row.
    row = {**PAIR, "score": 0.25, "is_duplicate": 0}
    assert convert(row, label="score").label == 0.25
    with pytest.raises(DataError, match="'is_duplicate' grades the pair"):
        convert(row, label="auto", grade="is_duplicate")
    assert convert({**PAIR, "score": None}, label="score").label is None


@pytest.mark.parametrize("layout", ["packed", "samples"])
def test_shards_hold_them(tmp_path, layout):
    rows = [{**TRIPLET, "scores": [3.0, 0.1, -2.5], "label": 0.2}, PAIR]
    records = [convert(row, **fields) for row, fields in zip(rows, [LABELLED, {}], strict=True)]
    with ShardWriter(tmp_path, records_per_shard=10, layout=layout) as writer:
        for record in records:
            writer.write(record)
    ((url, shard),) = resolve_source([str(tmp_path)])
    (segment,) = shard.segments
    with_label, without = read_segment(url, segment, fields=LABELLED, source="s")
    assert (with_label.scores, with_label.label) == ([3.0, 0.1, -2.5], 0.2)
    assert (without.scores, without.label) == (None, None)
    for need in ("scores", "label"):
        options = {"fields": LABELLED, "source": "s", "needs": [need]}
        needing = read_segment(url, segment, **options)
        assert needing.record(0) == with_label
        with pytest.raises(DataError, match=f"record '7' has no {need}, which") as caught:
            needing.record(1)
        assert str(caught.value).startswith(f"{url}: member ")
        assert caught.value.kind == "field"
