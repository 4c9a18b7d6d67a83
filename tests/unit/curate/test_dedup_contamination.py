import json
import random

import pytest
from test_dedup import ids_in, run, write

from largebatch.curate import minhash
from largebatch.curate.contamination import EvaluationIndex, NearSettings, build_index
from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set

RNG = random.Random(9)
VOCABULARY = [f"term{n}" for n in range(4000)]


def words(num):
    return " ".join(RNG.choice(VOCABULARY) for _ in range(num))


def changed(text, place):
    parts = text.split()
    parts[place] = "else"
    return " ".join(parts)


LONG_QUERY, QUERY_10, QUERY_5, PASSAGE, SENTENCE = map(words, (20, 10, 5, 60, 40))
SETS = {
    "one": RetrievalSet(
        "one",
        {"p1": PASSAGE, "p2": words(12)},
        {"q1": LONG_QUERY, "q2": QUERY_10},
        {"q1": {"p1": 1}},
    ),
    "two": RetrievalSet(
        "two",
        {"p1": f"{SENTENCE} {words(30)}", "empty": "", "mark": "?"},
        {"q1": QUERY_5, "q2": words(40), "unjudged": "What is it?"},
        {"q1": {"p1": 1}},
    ),
}
NEAR_QUERY = SETS["two"].queries["q2"]
PASSAGE_12 = SETS["one"].corpus["p2"]


@pytest.fixture
def sets(tmp_path):
    for name, one in SETS.items():
        save_retrieval_set(one, tmp_path / "eval" / name, split="dev" if name == "two" else "test")
    return {name: str(tmp_path / "eval" / name) for name in SETS}


def run_in_words(text, begin, num):
    return " ".join(text.split()[begin : begin + num])


CONTAMINATED = {
    "same-query": (f"{LONG_QUERY.upper()}!", words(30), "one", "same_query", "query"),
    "same-passage": (words(5), PASSAGE.replace(" ", ", "), "one", "same_passage", "document"),
    "query-as-document": (words(5), QUERY_5, "two", "same_query", "document"),
    "passage-as-query": (PASSAGE_12, words(9), "one", "same_passage", "query"),
    "unjudged": ("what is it", words(9), "two", "same_query", "query"),
    "near-query": (changed(NEAR_QUERY, 20), words(9), "two", "near_query", "query"),
    "near-passage": (words(5), changed(PASSAGE, 7), "one", "near_passage", "document"),
    "holds-13": (
        words(5),
        f"{words(9)} {run_in_words(LONG_QUERY, 5, 13)} {words(50)}",
        "one",
        "holds_query",
        "document",
    ),
    "holds-10": (f"{words(4)} {QUERY_10}", words(30), "one", "holds_query", "query"),
    "holds-passage": (words(4), f"{words(90)} {PASSAGE}", "one", "holds_passage", "document"),
    "holds-passage-12": (words(4), f"{PASSAGE_12} {words(9)}", "one", "holds_passage", "document"),
    "both": (QUERY_10, PASSAGE, "one", "same_query", "query"),
}
CLEAN = {
    "12-of-20": (words(5), f"{words(9)} {run_in_words(LONG_QUERY, 5, 12)} {words(50)}"),
    "9-of-10": (words(5), f"{run_in_words(QUERY_10, 0, 9)} {words(50)}"),
    "holds-5": (words(5), f"{words(9)} {QUERY_5} {words(9)}"),
    "shares-a-sentence": (words(5), f"{SENTENCE} {words(60)}"),
    "most-of-a-passage": (words(5), f"{run_in_words(PASSAGE, 0, 30)} {words(30)}"),
    "far": (words(5), changed(changed(changed(changed(PASSAGE, 7), 20), 33), 50)),
    "marks": ("?!", "..."),
}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_planted_contamination_goes_and_nothing_else(sets, tmp_path, num_workers):
    pairs = [(name, query, document) for name, (query, document, *_) in CONTAMINATED.items()]
    pairs += [(name, query, document) for name, (query, document) in CLEAN.items()]
    RNG.shuffle(pairs)
    source = write(tmp_path / "in", pairs)
    report = run({"s": source}, tmp_path / "out", evaluation_sets=sets, num_workers=num_workers)
    assert sorted(ids_in(tmp_path / "out/s")) == sorted(CLEAN)
    expected: dict[str, dict[str, int]] = {}
    for _, _, name, way, _ in CONTAMINATED.values():
        expected.setdefault(name, {}).setdefault(way, 0)
        expected[name][way] += 1
    assert report.sources[0].contaminated == expected
    assert report.evaluation_sets == [
        {"name": name, "queries": len(one.queries), "passages": len(one.corpus)}
        for name, one in SETS.items()
    ]


@pytest.mark.parametrize("name", CONTAMINATED)
def test_the_report_says_what_a_pair_holds_of_which_set(sets, tmp_path, name):
    query, document, set_name, way, side = CONTAMINATED[name]
    source = write(tmp_path / "in", [(name, query, document), ("clean", "a", "b")])
    run({"s": source}, tmp_path / "out", evaluation_sets=sets)
    (example,) = json.loads((tmp_path / "out/report.json").read_text())["examples"]
    assert (example["evaluation_set"], example["way"], example["side"]) == (set_name, way, side)
    assert example["dropped"]["id"] == name
    held = SETS[set_name].queries if way.endswith("query") else SETS[set_name].corpus
    shown = example["evaluation_text"].removesuffix("...")
    assert shown in {minhash.normalize(text)[: len(shown)] for text in held.values()}
    assert (example["similarity"] < 1) == way.startswith("near")


def test_a_run_does_not_reach_from_one_text_into_the_next(sets, tmp_path):
    begin, end = run_in_words(QUERY_10, 0, 5), run_in_words(QUERY_10, 5, 5)
    pairs = [("1", f"{words(9)} {begin}", begin), ("2", f"{end} {words(9)}", end)]
    run({"s": write(tmp_path / "in", pairs)}, tmp_path / "out", evaluation_sets=sets)
    assert ids_in(tmp_path / "out/s") == ["1", "2"]


def test_a_contaminated_pair_keeps_no_other_out(sets, tmp_path):
    document = words(60)
    query = words(40)
    bad = f"{query} {QUERY_10}"
    pairs = [("bad", bad, document), ("good", query, document)]
    assert minhash.similarity(bad, query, 3) > 0.7
    run({"s": write(tmp_path / "in", pairs)}, tmp_path / "out", threshold=0.7, evaluation_sets=sets)
    assert ids_in(tmp_path / "out/s") == ["good"]


def test_without_near_only_same_and_holds_count(sets, tmp_path):
    pairs = [(name, query, document) for name, (query, document, *_) in CONTAMINATED.items()]
    run({"s": write(tmp_path / "in", pairs)}, tmp_path / "out", near=False, evaluation_sets=sets)
    # The near query holds 13 words of the other one too.
    assert ids_in(tmp_path / "out/s") == ["near-passage"]


def test_colliding_hashes_contaminate_nothing(sets, tmp_path, monkeypatch):
    near = NearSettings(threshold=0.8, ngram_words=3, num_hashes=64)
    # Every word has the same hash, so that all texts of a length seem alike.
    monkeypatch.setattr(minhash, "_VOCABULARY", _Constant())
    build_index(
        {name: tmp_path / "eval" / name for name in SETS},
        tmp_path / "index",
        near=near,
        on_set=lambda _: None,
    )
    index = EvaluationIndex(tmp_path / "index", near=near)
    texts = [minhash.normalize(text) for pair in CLEAN.values() for text in pair]
    rows = minhash.hash_words(texts)
    signatures = minhash.sign(minhash.ngrams(rows, 3), 64)
    assert index.find(texts, rows, signatures) == {}


class _Constant(dict):
    def __missing__(self, word):
        return 12345


def test_a_set_that_is_not_there_is_named(tmp_path):
    source = write(tmp_path / "in", [("1", "q", "d")])
    with pytest.raises(UserError, match=r"retrieval set .*nowhere: there is no such folder"):
        run(
            {"s": source},
            tmp_path / "out",
            evaluation_sets={"x": str(tmp_path / "nowhere")},
        )
    assert not (tmp_path / "out/.scratch").exists()
