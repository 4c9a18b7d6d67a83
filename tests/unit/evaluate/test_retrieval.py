import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, nDCG

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet
from largebatch.evaluate.retrieval import (
    METRICS,
    evaluate_embeddings,
    evaluate_encoder,
    rank_by_embeddings,
    retrieval_scores,
    texts_to_encode,
)


def by_formula(run, qrels):
    """Written from the definitions: the mean of nDCG@10, MRR@10 and Recall@10."""
    totals = np.zeros(3)
    for query, judgments in qrels.items():
        scores = run.get(query, {})
        top = sorted(sorted(scores, reverse=True), key=lambda d: -scores[d])[:10]
        gains = [max(judgments.get(d, 0), 0) for d in top]
        ideal = sorted((g for g in judgments.values() if g > 0), reverse=True)
        if not ideal:
            continue
        dcg, best = (sum(g / np.log2(i + 2) for i, g in enumerate(x[:10])) for x in (gains, ideal))
        first = next((1 / (i + 1) for i, g in enumerate(gains) if g > 0), 0.0)
        totals += dcg / best, first, sum(g > 0 for g in gains) / len(ideal)
    return dict(zip(METRICS, totals / len(qrels), strict=True))


def random_judgments(rng, num_queries, num_documents):
    return {
        f"q{query}": {
            f"d{document}": int(rng.integers(0, 4))
            for document in rng.choice(num_documents, size=rng.integers(1, 20), replace=False)
        }
        for query in range(num_queries)
    }


def random_run(rng, num_queries, num_documents, scores):
    return {
        f"q{query}": {
            f"d{document}": float(rng.choice(scores))
            for document in rng.choice(num_documents, size=30, replace=False)
        }
        for query in range(1, num_queries)  # q0 is judged, but not in the run.
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_scores_equal_the_formula(seed, ties):
    rng = np.random.default_rng(seed)
    qrels = random_judgments(rng, 20, 60)
    qrels["q1"] = dict.fromkeys(qrels["q1"], 0)
    run = random_run(rng, 20, 60, np.arange(4) / 4 if ties else rng.random(10_000))
    scores = retrieval_scores(run, qrels)
    assert tuple(scores) == METRICS
    assert scores == pytest.approx(by_formula(run, qrels), abs=1e-6)
    assert 0.05 < scores["ndcg@10"] < 0.95
    direct = ir_measures.calc_aggregate([nDCG @ 10, R @ 10, RR @ 10], qrels, run)
    assert scores["ndcg@10"] == pytest.approx(direct[nDCG @ 10], abs=1e-6)
    assert scores["recall@10"] == pytest.approx(direct[R @ 10], abs=1e-6)
    if not ties:  # ir_measures takes MRR from another library, which breaks ties the other way.
        assert scores["mrr@10"] == pytest.approx(direct[RR @ 10], abs=1e-6)


def test_scores_by_hand():
    run = {
        "q": {"a": 3.0, "b": 2.0, "c": 1.0, **{f"x{i}": -float(i) for i in range(20)}, "e": -99.0}
    }
    qrels = {"q": {"b": 2, "c": 1, "e": 1, "a": 0}}
    log3, log4 = np.log2(3), np.log2(4)
    assert retrieval_scores(run, qrels) == pytest.approx(
        {
            "ndcg@10": (2 / log3 + 1 / log4) / (2 + 1 / log3 + 1 / log4),
            "mrr@10": 1 / 2,
            "recall@10": 2 / 3,
        },
        abs=1e-9,
    )


def test_scores_do_not_depend_on_the_order_of_tied_documents():
    qrels = {"q": {"b": 1}}
    assert retrieval_scores({"q": {"a": 1.0, "b": 1.0}}, qrels)["mrr@10"] == 1
    assert retrieval_scores({"q": {"b": 1.0, "a": 1.0}}, qrels)["mrr@10"] == 1
    # The larger id is first, so here the relevant document is second.
    assert retrieval_scores({"q": {"b": 1.0, "c": 1.0}}, qrels)["mrr@10"] == 0.5
    assert retrieval_scores({"q": {"c": 1.0, "b": 1.0}}, qrels)["mrr@10"] == 0.5


@pytest.mark.parametrize("tiles", [(1024, 8192), (3, 7), (1, 1)])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_ranks_as_a_full_sort(tiles, k):
    rng = np.random.default_rng(k)
    queries = rng.standard_normal((11, 16), dtype=np.float32)
    documents = rng.standard_normal((50, 16), dtype=np.float32)
    documents = documents[rng.integers(0, 50, size=90)]  # Many occur more than once.
    positions, scores = rank_by_embeddings(
        queries, documents, k=k, query_tile=tiles[0], document_tile=tiles[1]
    )
    exact = (queries[:, None].astype(np.float64) * documents).sum(axis=-1).astype(np.float32)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, axis=1))


def test_ties_at_zero_and_below_follow_positions():
    documents = np.array([[-1.0], [-0.0], [0.0], [-1.0], [2.0], [0.0]], np.float32)
    positions, scores = rank_by_embeddings(np.array([[1.0], [-0.0]], np.float32), documents)
    assert positions.tolist() == [[4, 1, 2, 5, 0, 3], [0, 1, 2, 3, 4, 5]]
    assert scores.tolist() == [[2, 0, 0, 0, -1, -1], [0] * 6]


def test_tied_documents_at_the_cut_are_chosen_by_position():
    same = np.ones((300, 8), np.float32)
    for tile in (7, 64, 8192):
        positions, _ = rank_by_embeddings(same[:2], same, k=100, document_tile=tile)
        assert positions.tolist() == [list(range(100))] * 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_embeddings_that_are_not_finite(value):
    good, bad = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    bad[1, 2] = value
    with pytest.raises(UserError, match="a query embedding"):
        rank_by_embeddings(bad, good)
    with pytest.raises(UserError, match="a document embedding"):
        rank_by_embeddings(good, bad)


class BagOfLetters:
    """Embeds a text by its counts of letters, plus noise that depends on its place in the list."""

    device = torch.device("cpu")

    def __init__(self, noise=1e-6):
        self.noise = noise
        self.calls = []

    def encode(self, texts, *, side, tokens_per_chunk, progress):
        self.calls.append((list(texts), side, tokens_per_chunk, progress))
        counts = [[text.count(letter) for letter in "abcdefgh"] for text in texts]
        noise = np.arange(len(texts))[:, None] * self.noise
        return (np.array(counts) + noise).astype(np.float32)


LETTERS = RetrievalSet(
    "letters",
    {"1": "aab", "2": "cdc", "3": "aab", "4": "hg", "5": "efe"},
    {"x": "a", "y": "h", "z": "unjudged", "same": "a"},
    {"x": {"1": 1}, "y": {"4": 2, "5": 1}, "same": {"3": 1}},
)


def test_evaluates_an_encoder():
    encoder = BagOfLetters()
    scores = evaluate_encoder(encoder, LETTERS, tokens_per_chunk=64)
    queries, documents = texts_to_encode(LETTERS)
    # Each text once, and only queries that are judged.
    assert (sorted(queries), sorted(documents)) == (["a", "h"], ["aab", "cdc", "efe", "hg"])
    assert encoder.calls == [(queries, "query", 64, False), (documents, "document", 64, False)]
    # "aab" is found first by both; of the two equal ones, 3 is put before 1.
    assert scores["mrr@10"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["recall@10"] == 1


def test_the_order_of_ids_does_not_matter():
    backwards = RetrievalSet(
        LETTERS.name,
        dict(reversed(LETTERS.corpus.items())),
        dict(reversed(LETTERS.queries.items())),
        {q: dict(reversed(j.items())) for q, j in reversed(LETTERS.qrels.items())},
    )
    assert texts_to_encode(backwards) == texts_to_encode(LETTERS)
    assert evaluate_encoder(BagOfLetters(), backwards) == evaluate_encoder(BagOfLetters(), LETTERS)


def test_ranks_may_encode_a_share_each():
    encoder = BagOfLetters(noise=0)
    queries, documents = texts_to_encode(LETTERS)
    options = {"tokens_per_chunk": 8, "progress": False}
    parts = [encoder.encode([d], side="document", **options) for d in documents]
    joined = evaluate_embeddings(
        LETTERS, encoder.encode(queries, side="query", **options), np.concatenate(parts)
    )
    assert joined == evaluate_encoder(BagOfLetters(noise=0), LETTERS)
