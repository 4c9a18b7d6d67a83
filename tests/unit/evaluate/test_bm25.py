import math

import pytest

from largebatch.evaluate.beir import RetrievalSet
from largebatch.evaluate.bm25 import bm25_run, evaluate_bm25, words

SMALL = RetrievalSet(
    "small",
    {
        "a": "def load_tokens(path): read tokens",
        "b": "The token, the cat and the Tokens",
        "c": "",
        "d": "nothing of that",
        "e": "def load_tokens(path): read tokens",
    },
    {"q": "load TOKENS", "unknown": "zebra", "empty": "", "unjudged": "cat"},
    {"q": {"a": 1, "d": 0}, "unknown": {"b": 1}, "empty": {"c": 1}},
)


def by_formula(query, texts, k1=1.5, b=0.75):
    """Lucene's BM25, term by term."""
    split = {i: words(text) for i, text in texts.items()}
    mean = sum(map(len, split.values())) / len(split)
    scores = {}
    for i, document in split.items():
        total = 0.0
        for word in words(query):
            holders = sum(word in other for other in split.values())
            idf = math.log(1 + (len(split) - holders + 0.5) / (holders + 0.5))
            count = document.count(word)
            total += idf * count / (k1 * (1 - b + b * len(document) / mean) + count)
        if total:
            scores[i] = total
    return scores


def test_words_split_identifiers_and_keep_other_alphabets():
    assert words("np.int2str(max_tokens) Größe 数 n°") == [
        *("np", "int2str", "max", "tokens", "größe", "数", "n"),
    ]


def test_scores_are_lucenes(capfd):
    run = bm25_run(SMALL)
    assert run["q"] == pytest.approx(by_formula("load TOKENS", SMALL.corpus), rel=1e-5)
    assert list(run["q"]) == ["e", "a", "b"]  # Equal texts: the larger id first.
    assert sorted(run) == ["empty", "q", "unknown"]
    assert run["unknown"] == run["empty"] == {}
    assert capfd.readouterr() == ("", "")


def test_keeps_k_documents():
    assert list(bm25_run(SMALL, k=2)["q"]) == ["e", "a"]


def test_tiles_do_not_change_the_run(monkeypatch):
    whole = bm25_run(SMALL)
    monkeypatch.setattr("largebatch.evaluate.bm25._TILE_SCORES", 1)
    assert bm25_run(SMALL) == whole


def test_evaluates():
    assert evaluate_bm25(SMALL) == pytest.approx(
        {"ndcg@10": 1 / math.log2(3) / 3, "mrr@10": 1 / 2 / 3, "recall@10": 1 / 3}
    )


def test_a_corpus_without_words_finds_nothing():
    silent = SMALL._replace(corpus=dict.fromkeys(SMALL.corpus, "?!"))
    assert bm25_run(silent) == {"q": {}, "unknown": {}, "empty": {}}
    assert evaluate_bm25(silent)["recall@10"] == 0
