import weakref

import ir_measures
import numpy as np
import pytest
import torch
from dist import run_ranks
from ir_measures import RR, R, nDCG

from largebatch.errors import UserError
from largebatch.evaluate import retrieval
from largebatch.evaluate.beir import RetrievalSet
from largebatch.evaluate.retrieval import METRICS, Search, evaluate_encoder, retrieval_scores


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


def test_judgments_below_1_and_of_documents_that_are_not_there():
    """As trec_eval, and so BEIR: no gain below 1; what can't be found is in the ideal order."""
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}, "zero": {"a": 1.0}, "below": {"a": 1.0}}
    qrels = {"q": {"a": -1, "b": 2, "c": -2, "gone": 1}, "zero": {"a": 0}, "below": {"a": -1}}
    log3 = np.log2(3)
    assert retrieval_scores(run, qrels) == pytest.approx(
        {
            "ndcg@10": 2 / log3 / (2 + 1 / log3) / 3,
            "mrr@10": 1 / 2 / 3,
            "recall@10": 1 / 2 / 3,
        },
        abs=1e-9,
    )


def test_the_query_itself_is_passed_over_unless_it_is_relevant():
    run = {"7": {"7": 2.0, "8": 1.0}}
    for judgments in ({"8": 1}, {"8": 1, "7": 0}):
        assert retrieval_scores(run, {"7": judgments})["mrr@10"] == 1
    assert retrieval_scores(run, {"7": {"7": 1}})["mrr@10"] == 1
    assert retrieval_scores(run, {"7": {"9": 1}})["mrr@10"] == 0
    # Nine before the tenth, which is relevant: the query itself takes no place among them.
    among = {"q": {"q": 99.0, **{f"x{i}": 50.0 - i for i in range(9)}, "right": 1.0}}
    assert retrieval_scores(among, {"q": {"right": 1}})["recall@10"] == 1


def rank(queries, documents, *, k=100, slices=((0, None),), **tiles):
    search = Search(queries, k=k, **tiles)
    for first, last in slices:
        search.add(documents[first:last], first)
    return search.found()


@pytest.mark.parametrize("tiles", [(1024, 8192), (3, 7), (1, 1)])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_ranks_as_a_full_sort(tiles, k):
    rng = np.random.default_rng(k)
    queries = rng.standard_normal((11, 16), dtype=np.float32)
    documents = rng.standard_normal((50, 16), dtype=np.float32)
    documents = documents[rng.integers(0, 50, size=90)]  # Many occur more than once.
    positions, scores = rank(
        queries,
        documents,
        k=k,
        slices=((40, None), (0, 17), (17, 40)),
        query_tile=tiles[0],
        document_tile=tiles[1],
    )
    exact = (queries[:, None].astype(np.float64) * documents).sum(axis=-1).astype(np.float32)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, axis=1))


def test_ties_at_zero_and_below_follow_positions():
    documents = np.array([[-1.0], [-0.0], [0.0], [-1.0], [2.0], [0.0]], np.float32)
    positions, scores = rank(np.array([[1.0], [-0.0]], np.float32), documents)
    assert positions.tolist() == [[4, 1, 2, 5, 0, 3], [0, 1, 2, 3, 4, 5]]
    assert scores.tolist() == [[2, 0, 0, 0, -1, -1], [0] * 6]


def test_tied_documents_at_the_cut_are_chosen_by_position():
    same = np.ones((300, 8), np.float32)
    for tile in (7, 64, 8192):
        positions, _ = rank(same[:2], same, k=100, document_tile=tile)
        assert positions.tolist() == [list(range(100))] * 2


class BagOfLetters:
    """Embeds a text by its counts of letters, plus noise that depends on its place in the list.

    Some texts at a time, `per_slice` of them.
    """

    device = torch.device("cpu")

    def __init__(self, noise=1e-6, per_slice=2):
        self.noise = noise
        self.per_slice = per_slice
        self.calls = []

    def embed(self, texts, *, side, truncate_dim=None, tokens_per_chunk, progress):
        assert truncate_dim is None
        self.calls.append((list(texts), side, tokens_per_chunk, progress))
        counts = [[text.count(letter) for letter in "abcdefgh"] for text in texts]
        noise = np.arange(len(texts))[:, None] * self.noise
        whole = (np.array(counts).reshape(-1, 8) + noise).astype(np.float32)
        for first in range(0, len(texts), self.per_slice):
            yield whole[first : first + self.per_slice]

    def encode(self, texts, **options):
        return np.concatenate([np.empty((0, 8), np.float32), *self.embed(texts, **options)])


LETTERS = RetrievalSet(
    "letters",
    {"1": "aab", "2": "cdc", "3": "aab", "4": "hg", "5": "efe"},
    {"x": "a", "y": "h", "z": "unjudged", "same": "a"},
    {"x": {"1": 1}, "y": {"4": 2, "5": 1}, "same": {"3": 1}},
)


def test_evaluates_an_encoder():
    encoder = BagOfLetters()
    scores = evaluate_encoder(encoder, LETTERS, tokens_per_chunk=64)
    # Each text once, and only queries that are judged.
    (queries, *of_queries), (documents, *of_documents) = encoder.calls
    assert (sorted(queries), sorted(documents)) == (["a", "h"], ["aab", "cdc", "efe", "hg"])
    assert (of_queries, of_documents) == (["query", 64, False], ["document", 64, False])
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
    encoders = BagOfLetters(), BagOfLetters()
    assert evaluate_encoder(encoders[0], backwards) == evaluate_encoder(encoders[1], LETTERS)
    assert encoders[0].calls == encoders[1].calls


def random_set(num_documents, num_queries):
    """Return a set in which many documents are equal, and many more tie."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(num_documents)]
    corpus = {f"d{i}": texts[rng.integers(num_documents // 2 + 1)] for i in range(num_documents)}
    queries = {f"q{i}": "".join(rng.choice(list("abcdefgh"), 3)) for i in range(num_queries)}
    return RetrievalSet("random", corpus, queries, {query: {"d0": 1} for query in queries})


def run_of(retrieval_set, k, make=BagOfLetters):
    """Return what is found for each query, best first, instead of its scores."""
    retrieval.retrieval_scores = lambda run, qrels: {
        query: list(found.items()) for query, found in run.items()
    }
    return evaluate_encoder(make(noise=0), retrieval_set, k=k)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("num_documents", "num_queries", "k"), [(60, 7, 5), (60, 4, 100), (3, 2, 2), (1, 1, 100)]
)
def test_any_number_of_ranks_finds_what_a_full_sort_does(
    num_documents, num_queries, k, world_size, monkeypatch
):
    monkeypatch.setattr(retrieval, "_QUERIES_PER_GATHER", 3)
    retrieval_set = random_set(num_documents, num_queries)

    def score(query, document):
        return float(sum(query.count(letter) * document.count(letter) for letter in "abcdefgh"))

    expected = {
        query_id: sorted(
            ((i, score(query, text)) for i, text in retrieval_set.corpus.items()),
            key=lambda found: (found[1], found[0]),
            reverse=True,
        )[:k]
        for query_id, query in retrieval_set.queries.items()
    }
    assert run_ranks(run_of, world_size, retrieval_set, k) == [expected] * world_size


class FailsOnRank1(BagOfLetters):
    """Its second rank fails in the midst of the documents."""

    error: Exception

    def embed(self, texts, *, side, **options):
        yield from super().embed(texts[:2], side=side, **options)
        if side == self.fails_at and torch.distributed.get_rank() == 1:
            raise self.error


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("error", [UserError("row 3 is bad"), MemoryError("no room")])
def test_an_error_on_one_rank_ends_all(side, error):
    def fail():
        encoder = FailsOnRank1()
        encoder.error, encoder.fails_at = error, side
        try:
            evaluate_encoder(encoder, random_set(20, 4))
        except Exception as raised:
            return type(raised).__name__, str(raised)

    others = ("UserError", "row 3 is bad")
    if isinstance(error, MemoryError):
        others = ("RuntimeError", "rank 1 failed: MemoryError: no room")
    own = (type(error).__name__, str(error))
    assert run_ranks(fail, 3) == [others, own, others]


def test_a_search_that_does_not_fit_the_device_is_told(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(retrieval, "_merge", full)
    with pytest.raises(UserError, match="cpu has too little memory to search letters for 2 quer"):
        evaluate_encoder(BagOfLetters(), LETTERS)


def test_no_more_than_a_slice_of_documents_is_held():
    alive, most = weakref.WeakSet(), []

    class Part(np.ndarray):
        """An array that can be counted."""

    class Watched(BagOfLetters):
        def embed(self, texts, **options):
            for first in range(0, len(texts), 10):
                (part,) = BagOfLetters(per_slice=10).embed(texts[first : first + 10], **options)
                part = part.copy().view(Part)
                alive.add(Counted(part))
                yield part
                most.append(len(alive))

    class Counted:
        """Lives as long as the array it is hung on."""

        def __init__(self, part):
            part.counted = self

    numbered = {f"d{i}": f"a{i}" for i in range(500)}
    evaluate_encoder(Watched(), LETTERS._replace(corpus=numbered | LETTERS.corpus))
    assert len(most) >= 50
    assert max(most) <= 2
