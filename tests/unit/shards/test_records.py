from decimal import Decimal

import pytest

from largebatch.errors import DataError, UserError
from largebatch.shards.records import Record, record_from_mapping


def convert(mapping, **fields):
    return record_from_mapping(mapping, fields=fields, source="s", default_id="7", where="row 1")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        pytest.param({"query": "q", "document": "d"}, ("q", "d", []), id="ours"),
        pytest.param(
            {"query": "q", "document": "d", "negatives": ["m", "n"], "text": "x", "positive": "y"},
            ("q", "d", ["m", "n"]),
            id="ours-beside-other-names",
        ),
        pytest.param(
            {"anchor": "q", "positive": "d", "negative": "n"}, ("q", "d", ["n"]), id="st-triplet"
        ),
        pytest.param(
            {
                "anchor": "q",
                "positive": "d",
                "negative_10": "3",
                "negative_2": "2",
                "negative": "1",
            },
            ("q", "d", ["1", "2", "3"]),
            id="st-numbered",
        ),
        pytest.param({"query": "q", "positive": "d"}, ("q", "d", []), id="st-query"),
        pytest.param({"question": "q", "answer": "d"}, ("q", "d", []), id="st-question"),
        pytest.param({"query": "q", "answer": "d"}, ("q", "d", []), id="st-query-answer"),
        pytest.param({"title": "q", "body": "d"}, ("q", "d", []), id="st-title-body"),
        pytest.param({"title": "q", "abstract": "d"}, ("q", "d", []), id="st-title-abstract"),
        pytest.param({"sentence1": "q", "sentence2": "d"}, ("q", "d", []), id="st-sentences"),
        pytest.param(
            {"query": "q", "pos": ["d", "d2"], "neg": ["n", "m"], "pos_scores": [1, 2]},
            ("q", "d", ["n", "m"]),
            id="flagembedding",
        ),
        pytest.param(
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "t", "text": "d"}],
                "negative_passages": [
                    {"docid": "2", "title": "", "text": "n"},
                    {"docid": "3", "title": None, "text": "m"},
                ],
            },
            ("q", "t d", ["n", "m"]),
            id="tevatron",
        ),
        pytest.param(
            {
                "query": "q",
                "positive_passages": {"title": ["t"], "text": ["d"]},
                "negative_passages": {"title": ["", "u"], "text": ["n", "m"]},
            },
            ("q", "t d", ["n", "u m"]),
            id="tevatron-as-columns",
        ),
        pytest.param(
            {"question": "q", "pos_doc": [{"text": "d"}], "neg_doc": [{"text": "n"}, "m"]},
            ("q", "d", ["n", "m"]),
            id="automodel",
        ),
        pytest.param(
            {"query": "q", "pos_doc": "d", "neg_doc": ["n"]}, ("q", "d", ["n"]), id="inline"
        ),
        pytest.param({"query": "q", "title": "t", "text": "d"}, ("q", "d", []), id="beir"),
    ],
)
def test_names_of_each_ecosystem_are_recognized(mapping, expected):
    assert convert(mapping) == Record(*expected, source="s", id="7")


def test_fields_name_the_users_own():
    mapping = {"heading": "q", "body": "d", "bad": "n", "bad_1": "m", "key": 12, "id": "x"}
    record = convert(mapping, query="heading", document="body", negatives="bad", id="key")
    assert record == Record("q", "d", ["n", "m"], "s", "12")


def test_a_mapped_field_leaves_the_other_to_be_recognized():
    assert convert({"q": "q", "document": "d"}, query="q")[:2] == ("q", "d")
    assert convert({"query": "q", "wrong": "d", "document": "x"}, document="wrong")[:2] == (
        "q",
        "d",
    )
    # The field that is the document is not a query as well.
    assert convert({"anchor": "q", "query": "d"}, document="query")[:2] == ("q", "d")


@pytest.mark.parametrize("name", ["id", "_id", "query_id", "query-id", "question_id"])
def test_ids_are_recognized(name):
    assert convert({"query": "q", "document": "d", name: "i"}).id == "i"


def test_source_is_the_rows_own_where_none_is_given():
    row = {"query": "q", "document": "d", "source": "own"}
    assert convert(row).source == "s"
    assert record_from_mapping(row, fields={}, source="", default_id="", where="").source == "own"


def test_null_is_empty():
    record = convert({"query": None, "pos": [], "neg": [None, "", "n"], "id": None})
    assert record == Record("", "", ["n"], "s", "7")


@pytest.mark.parametrize(
    ("mapping", "fields", "parts"),
    [
        ({"query": "q", "bdy": "d"}, {"document": "body"}, ["'bdy'", "did you mean 'bdy'"]),
        ({"query": "q", "document": "d"}, {"negatives": "neg"}, ["fields.negatives='neg'"]),
        ({"a": "q", "b": "d"}, {}, ["no query and no document", "'a', 'b'", "fields={query:"]),
        ({"query": "q", "b": "d"}, {"query": "query"}, ["no document", "'query', 'b'"]),
        ({"query": "q", "x": "d"}, {}, ["no document is", "'query', 'x'"]),
        ({"x": "q", "document": "d"}, {}, ["no query is"]),
        ({"anchor": "q", "document": "d"}, {}, ["no query with its document"]),
        ({}, {}, ["none"]),
        ({"query": 3, "document": "d"}, {}, ["'query'", "a number"]),
        ({"query": "q", "document": True}, {}, ["'document'", "true or false"]),
        ({"query": ["q"], "document": "d"}, {}, ["'query'", "a list"]),
        ({"query": "q", "pos": ["d"], "neg": [1]}, {}, ["'neg'", "a number"]),
        ({"query": "q", "document": "d", "id": 1.5}, {}, ["'id'", "a number"]),
        ({"query": "q", "document": "\ud800"}, {}, ["'document'", "surrogate"]),
        ({"question": "q", "pos_doc": [{"id": "d1"}]}, {}, ["'pos_doc'", "corpus elsewhere"]),
        ({"question": "q", "pos_doc": [{"body": "d"}]}, {}, ["'pos_doc'", "named 'text'"]),
    ],
)  # fmt: skip
def test_what_is_no_record_is_told(mapping, fields, parts):
    with pytest.raises(UserError) as caught:
        convert(mapping, **fields)
    message = str(caught.value)
    assert message.startswith("row 1: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_blank_id_is_none(value):
    assert convert({"query": "q", "document": "d", "id": value}).id == "7"


NO = [
    ("label", 0),
    ("label", 2),
    ("label", -1),
    ("label", "0"),
    ("label", "not_entailment"),
    ("Label", False),
    ("labels", 0),
    ("label_text", "neutral"),
    ("gold_label", "-"),
    ("goldLabel", "contradiction"),
    ("entailment judgement", "NEUTRAL"),
    ("is_duplicate", 0),
    ("duplicate", "no"),
    ("is_positive", False),
    ("is_negative", 1),
    ("relevance", 0.0),
    ("relevance_score", "0.25"),
    ("score", 0.01),
    ("score", Decimal("0.5")),
    ("score", 4.8),
    ("similarity_score", 0.9),
    ("cosine_similarity", 0.3),
    ("labels", [0]),
]


@pytest.mark.parametrize(
    "pair",
    [("query", "document"), ("anchor", "positive"), ("sentence1", "sentence2"), ("q", "a")],
)
@pytest.mark.parametrize(("name", "value"), NO)
def test_a_row_that_says_it_is_no_positive_pair_is_none(pair, name, value):
    row = {pair[0]: "q", pair[1]: "d", name: value}
    for fields in [{"query": pair[0], "document": pair[1]}] + [{}] * (pair != ("q", "a")):
        with pytest.raises(DataError) as caught:
            convert(row, **fields)
        assert caught.value.kind == "graded"
        assert f"field {name!r} grades the pair, and {value!r} does not" in str(caught.value)
        assert "grade=none" in str(caught.value)
        cure = "a row of its own" if isinstance(value, list) else "positives"
        assert cure in str(caught.value)
        assert convert(row, **fields, grade="none")[:2] == ("q", "d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label", 1),
        ("label", "1.0"),
        ("score", 1.0),
        ("gold_label", "Entailment"),
        ("is_duplicate", True),
        ("is_hard_negative", 0),
        ("relevance", None),
        ("relevance", float("nan")),
        ("label", ""),
        ("score", [0.9, 0.1]),
        ("scores", 0.1),
        ("votes", 0),
        ("language", "python"),
        ("positives", 0),
    ],
)
def test_a_grade_that_says_yes_or_nothing_leaves_a_pair_one(name, value):
    assert convert({"query": "q", "document": "d", name: value})[:2] == ("q", "d")


def test_a_grade_of_each_of_several_positives_is_looked_at():
    row = {"query": "q", "positive": ["a", "b"]}
    assert convert(row | {"label": [1, 1]})[:2] == ("q", "a")
    assert convert(row | {"label": [0, 1, 0]})[:2] == ("q", "a")  # by three people, perhaps
    for grades in ([0, 1], [1, 0]):
        with pytest.raises(
            DataError, match=r"field 'label' grades the pair, and \[., .\] does not"
        ):
            convert(row | {"label": grades})


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("label", 0, '"positives.label=VALUE"'),
        ("score", 0.5, "\"positives.score='>=NUMBER'\""),
        ("score", "0.5", "\"positives.score='>=NUMBER'\""),
        ("gold label", "x", '"positives={gold label: VALUE}"'),
    ],
)
def test_the_cure_of_a_grade_can_be_typed(name, value, cure):
    with pytest.raises(DataError) as caught:
        convert({"query": "q", "document": "d", name: value})
    assert cure in str(caught.value)


def test_a_field_of_the_users_own_may_grade():
    row = {"query": "q", "document": "d", "verdict": "bad", "label": 0}
    with pytest.raises(DataError, match="'verdict' grades the pair"):
        convert(row, grade="verdict")
    assert convert(row | {"verdict": "yes"}, grade="verdict").query == "q"
    with pytest.raises(DataError, match=r"fields\.grade='verdct' is not among .* 'verdict'"):
        convert(row, grade="verdct")
    # A field that holds a text of the pair grades nothing.
    assert convert({"query": "q", "label": "d"}, document="label").document == "d"


INVISIBLE = ["", " \t\n", "\u00a0\u3000", "\u200b\u200d\ufeff", "\u2060 \u00ad", "\x00"]


@pytest.mark.parametrize("blank", INVISIBLE)
def test_blank_positives_and_negatives_are_passed_over(blank):
    row = {"query": "q", "pos": [None, blank, "d"], "neg": [blank, "n", {"text": blank}]}
    assert convert(row) == Record("q", "d", ["n"], "s", "7")
    row = {"query": "q", "positive": "d", "negative_1": blank, "negative_2": "n"}
    assert convert(row).negatives == ["n"]
    assert convert({"query": "q", "pos": [blank]}).document == ""
