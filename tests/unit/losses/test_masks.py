"""False negatives found by hashes are those that the definition names, and no others."""

import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largebatch.losses.infonce import info_nce
from largebatch.losses.masks import FalseNegatives, PairHashes

CPU = torch.device("cpu")


def hashed(texts):
    return np.array([hash(("text", text)) for text in texts], np.int64)


def pairs(queries, documents, negatives=(), ids=None):
    return PairHashes(
        hashed(queries), hashed(documents), hashed(negatives), None if ids is None else hashed(ids)
    )


def masks_of_ranks(ranks, *, tile=3):
    """Return each rank's mask [b, m], put together from tiles."""
    of_ranks = [pairs(*rank) for rank in ranks]
    m = sum(len(documents) + len(negatives) for _, documents, negatives, _ in ranks)
    result = []
    for rank, (queries, *_) in enumerate(ranks):
        found = FalseNegatives(of_ranks, rank=rank, device=CPU)
        mask = torch.zeros(len(queries), m)
        for row in range(0, len(queries), tile):
            for column in range(0, m, tile):
                rows, columns = (
                    slice(row, min(row + tile, len(queries))),
                    slice(column, column + tile),
                )
                found.fill_(mask[rows, columns], rows, slice(column, min(column + tile, m)), 1)
        result.append(mask.bool().tolist())
    return result


def by_definition(ranks):
    known = {("text", q, q) for queries, *_ in ranks for q in queries}
    for queries, documents, _, ids in ranks:
        known |= {("text", q, d) for q, d in zip(queries, documents, strict=True)}
        known |= {("id", i, d) for i, d in zip(ids or [], documents, strict=False)}
    texts = [t for _, documents, negatives, _ in ranks for t in (*documents, *negatives)]
    first, result = 0, []
    for queries, documents, negatives, ids in ranks:
        mask = []
        for row, query in enumerate(queries):
            names = [("text", query), *([("id", ids[row])] if ids else [])]
            mask.append([
                any((*name, text) in known for name in names) and column != first + row
                for column, text in enumerate(texts)
            ])  # fmt: skip
        result.append(mask)
        first += len(documents) + len(negatives)
    return result


def one_rank(queries, documents, negatives="", ids=None):
    """Return which columns each row masks; texts are letters."""
    (mask,) = masks_of_ranks([(queries, documents, negatives, ids)])
    return [[column for column, masked in enumerate(row) if masked] for row in mask]


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_masked_is_counted_and_so_are_rows_without_negatives(symmetric):
    """Three of four records have the same document, and the fourth its own: no row but that one has
    more than a negative left; without it, none has any."""
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64))

    def counts(documents):
        n = len(documents)
        hashes = [pairs("abcd"[:n], documents)]
        found = info_nce(
            vectors[:n], vectors[:n], torch.arange(n), torch.tensor(2.0), symmetric=symmetric,
            false_negatives=FalseNegatives(hashes, rank=0, device=CPU), tile=2,
        )  # fmt: skip
        return found.totals[2:].tolist()

    assert counts("xyzw") == [0, 0]
    assert counts("xxxw") == [6, 0]
    assert counts("xxx") == [6, 3]


def test_nothing_twice_masks_nothing():
    assert one_rank("abc", "xyz", "uvw") == [[], [], []]


def test_a_document_that_stands_in_another_row_too():
    assert one_rank("abc", "xyx") == [[2], [], [0]]


def test_a_hard_negative_that_is_the_document():
    assert one_rank("ab", "xy", "xzy") == [[2], [4]]


def test_a_query_that_occurs_twice_answers_to_both_documents():
    assert one_rank("aba", "xyz") == [[2], [], [0]]


def test_a_known_document_wherever_it_stands():
    """Query a has documents x and z; z is also b's document and a hard negative."""
    assert one_rank("aab", "xzz", "z") == [[1, 2, 3], [0, 2, 3], [1, 3]]


def test_documents_that_share_a_query_stay_negatives_of_other_queries():
    """a has x and y, b has y: nothing says that x answers b."""
    assert one_rank("aab", "xyy") == [[1, 2], [0, 2], [1]]


def test_a_text_is_no_negative_of_itself():
    assert one_rank("ab", "xa", "b") == [[1], [2]]


def test_a_query_that_equals_its_document_keeps_it():
    """As in SimCSE: a pair's own document is never masked."""
    assert one_rank("abc", "abc") == [[], [], []]
    assert one_rank("aab", "aab") == [[1], [0], []]


def test_records_with_the_same_id():
    assert one_rank("abc", "xyz", ids="pqp") == [[2], [], [0]]
    assert one_rank("abc", "xyz", "z", ids="pqp") == [[2, 3], [], [0, 3]]
    assert one_rank("abc", "xyz", ids="pqr") == [[], [], []]


def test_all_alike():
    assert one_rank("aaa", "xxx", "x") == [[1, 2, 3], [0, 2, 3], [0, 1, 3]]


def random_ranks(seed):
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"[: draw.choice([2, 5, 12, 26])]
    with_ids = draw.random() < 0.5

    def some(number, alphabet=letters):
        return [draw.choice(alphabet) for _ in range(number)]

    ranks = []
    for _ in range(draw.randint(1, 4)):
        b, n = draw.randint(0, 6), draw.randint(0, 5)
        ranks.append((some(b), some(b), some(n), some(b, range(12)) if with_ids else None))
    return ranks


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_equals_the_definition_on_random_batches(tile):
    masked = free = 0
    for seed in range(150):
        ranks = random_ranks(seed)
        expected = by_definition(ranks)
        assert masks_of_ranks(ranks, tile=tile) == expected, ranks
        flat = [entry for mask in expected for row in mask for entry in row]
        masked, free = masked + sum(flat), free + len(flat) - sum(flat)
    assert masked > 1000
    assert free > 1000


def test_only_what_may_be_masked_is_looked_at():
    queries, documents = [f"q{n}" for n in range(100)], [f"d{n}" for n in range(100)]
    documents[70] = documents[20]
    found = FalseNegatives([pairs(queries, documents)], rank=0, device=CPU)
    row_index, column_index, mask = found.in_tile(slice(0, 100), slice(0, 100))
    assert row_index.flatten().tolist() == column_index.tolist() == [20, 70]
    assert mask.tolist() == [[False, True], [True, False]]
    assert found.in_tile(slice(0, 20), slice(0, 100)) is None
    assert found.in_tile(slice(20, 30), slice(30, 70)) is None


def test_the_worst_batch_holds_no_more_than_tiles():
    """All texts alike: every pair is masked, and memory still grows with rows, not with pairs."""
    b, tile = 300, 16

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.largest = max(self.largest, *sizes, 0)
            return out

    queries, documents = torch.randn(2, b, 4).requires_grad_().unbind()
    with Largest() as seen:
        found = FalseNegatives([pairs(["a"] * b, ["x"] * b, ids=["i"] * b)], rank=0, device=CPU)
        loss = info_nce(
            queries, documents, torch.arange(b), torch.tensor(3.0), symmetric=True,
            false_negatives=found, tile=tile,
        ).loss_sum  # fmt: skip
        loss.backward()
    assert seen.largest <= 8 * b < b * b / 10
    assert loss == 0  # no query has any negative
