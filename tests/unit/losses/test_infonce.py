"""InfoNCE in tiles equals the plain formula: value, every gradient, any tile, any split of rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largebatch.losses.infonce import OwnNegatives, info_nce
from largebatch.world import part_of_rank

TILES = [1, 3, 7, 64]
SIZES = [(1, 1), (1, 5), (2, 2), (7, 7), (7, 12), (13, 19)]


def inputs(b, m, *, d=5, seed=0, dtype=torch.float64):
    """Return queries, documents, the column of each query's document (shuffled), and a scale."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(b, d, generator=generator, dtype=dtype)
    documents = torch.randn(m, d, generator=generator, dtype=dtype)
    positives = torch.randperm(m, generator=generator)[:b]
    return queries, documents, positives, torch.tensor(1.7, dtype=dtype)


def plain(queries, documents, positives, scale, *, symmetric):
    """Return the sum over rows with the whole matrix; the positive apart, so nothing cancels."""
    logits = scale * queries @ documents.T
    own = logits[torch.arange(len(queries)), positives]
    others = logits.masked_fill(F.one_hot(positives, len(documents)).bool(), -torch.inf)
    loss = torch.logaddexp(others.logsumexp(1) - own, own.new_zeros(())).sum()
    if not symmetric:
        return loss
    columns = others[:, positives].logsumexp(0) - own
    return (loss + torch.logaddexp(columns, own.new_zeros(())).sum()) / 2


def value_and_gradients(function, queries, documents, positives, scale, **options):
    leaves = [t.clone().requires_grad_() for t in (queries, documents, scale)]
    value = function(leaves[0], leaves[1], positives, leaves[2], **options)
    value = value if isinstance(value, torch.Tensor) else value.loss_sum
    (3 * value).backward()  # so that a forgotten outer factor shows
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def test_the_plain_formula_is_cross_entropy():
    queries, documents, positives, scale = inputs(7, 12)
    logits = scale * queries @ documents.T
    expected = F.cross_entropy(logits, positives, reduction="sum")
    columns = F.cross_entropy(logits[:, positives].T, torch.arange(7), reduction="sum")
    given = (queries, documents, positives, scale)
    torch.testing.assert_close(plain(*given, symmetric=False), expected)
    torch.testing.assert_close(plain(*given, symmetric=True), (expected + columns) / 2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("b", "m"), SIZES)
def test_equals_the_plain_formula(b, m, tile, symmetric):
    given = inputs(b, m)
    expected = value_and_gradients(plain, *given, symmetric=symmetric)
    found = value_and_gradients(info_nce, *given, symmetric=symmetric, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(symmetric):
    queries, documents, positives, scale = inputs(4, 6)
    leaves = [t.requires_grad_() for t in (queries, documents, scale)]
    assert torch.autograd.gradcheck(
        lambda q, d, s: info_nce(q, d, positives, s, symmetric=symmetric, tile=3).loss_sum, leaves
    )


def combine_by_hand(parts, **options):
    """Return the ranks' `combine`, which gives all of them what it must: the first time round,
    each rank's statistics are noted only."""
    collected = []

    def note(*statistics):
        collected.append([t.clone() for t in statistics])
        return statistics

    for part in parts:
        info_nce(*part, **options, combine=note)
    logsumexps, highest, sums = (torch.stack(ranks) for ranks in zip(*collected, strict=True))
    combined = logsumexps.logsumexp(0), highest.amax(0), sums.sum(0)
    return lambda *_: tuple(t.clone() for t in combined)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_rows_split_over_ranks(size, symmetric):
    queries, documents, positives, scale = inputs(7, 12)
    expected = value_and_gradients(plain, queries, documents, positives, scale, symmetric=symmetric)
    rows = [part_of_rank(7, rank, size) for rank in range(size)]  # of 9 ranks two have no row
    parts = [
        (queries[r.start : r.stop], documents, positives[r.start : r.stop], scale) for r in rows
    ]
    combine = combine_by_hand(parts, symmetric=symmetric, tile=4)
    options = {"symmetric": symmetric, "combine": combine, "tile": 4}
    found = [value_and_gradients(info_nce, *part, **options) for part in parts]
    losses, grad_queries, grad_documents, grad_scale = zip(*found, strict=True)
    torch.testing.assert_close(sum(losses), expected[0])
    torch.testing.assert_close(torch.cat(grad_queries), expected[1])
    torch.testing.assert_close(sum(grad_documents), expected[2])
    torch.testing.assert_close(sum(grad_scale), expected[3])

    correct = int((queries @ documents.T).argmax(1).eq(positives).sum())
    for part in parts:
        totals = info_nce(*part, **options).totals
        torch.testing.assert_close(totals[0], expected[0])
        assert totals[1] == correct
    assert 0 < correct < 7


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_tile_by_tile(dtype, symmetric):
    queries, documents, positives, scale = inputs(30, 50, d=8)
    given = (queries.to(dtype), documents.to(dtype), positives, scale.float())
    exact = [t.double() if t.is_floating_point() else t for t in given]
    expected = value_and_gradients(plain, *exact, symmetric=symmetric)
    found = value_and_gradients(info_nce, *given, symmetric=symmetric, tile=7)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype, torch.float32]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[3].double(), expected[3], rtol=1e-5, atol=0)
    for gradient, reference in zip(found[1:3], expected[1:3], strict=True):
        # Rounded once, at the end: to within half a unit in the last place, and no more.
        half_a_unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(gradient.double(), reference, rtol=1.01 * half_a_unit, atol=1e-6)


def test_a_fixed_temperature_costs_no_gradient_and_changes_none():
    given = inputs(7, 12)
    expected = value_and_gradients(info_nce, *given, symmetric=True, tile=4)
    leaves = [t.clone().requires_grad_() for t in given[:2]]
    (3 * info_nce(*leaves, *given[2:], symmetric=True, tile=4).loss_sum).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected[1:3], rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("noise", [0.5, 0.35, 0.3, 0.2])
def test_float32_at_a_low_temperature_with_confident_positives(noise, symmetric):
    """Mean losses from 1 to 1e-10, where P - 1 in float32 would be nothing but rounding."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(200, 64, generator=generator), dim=1)
    documents = queries + noise / 2 * torch.randn(200, 64, generator=generator)
    negatives = torch.randn(30, 64, generator=generator)
    documents = F.normalize(torch.cat([documents, negatives]), dim=1)
    given = (queries, documents, torch.arange(200), torch.tensor(100.0))
    exact = [t.double() if t.is_floating_point() else t for t in given]
    expected = value_and_gradients(plain, *exact, symmetric=symmetric)
    found = value_and_gradients(info_nce, *given, symmetric=symmetric, tile=64)
    for measured, reference in zip(found, expected, strict=True):
        assert (measured - reference).norm() < 1e-5 * reference.norm()
        assert reference.norm() > 0


class _LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("symmetric", [False, True])
def test_never_holds_more_than_a_tile(symmetric):
    b, m, d, tile = 100, 130, 4, 32
    queries, documents, positives, scale = inputs(b, m, d=d)
    leaves = [t.requires_grad_() for t in (queries, documents, scale)]
    with _LargestTensor() as seen:
        info_nce(
            leaves[0], leaves[1], positives, leaves[2], symmetric=symmetric, tile=tile
        ).loss_sum.backward()
    assert seen.largest <= max(tile * tile, m * d)
    with _LargestTensor() as whole:
        plain(*(t.detach() for t in (queries, documents)), positives, scale, symmetric=symmetric)
    assert whole.largest >= b * m  # the instrument sees what it should


def test_correct_is_whether_no_document_scores_above_the_own():
    queries = torch.eye(3)
    documents = torch.tensor([[1.0, 0, 0], [0, 1, 5], [0, 0, 1], [0, 1, 0]])
    found = info_nce(queries, documents, torch.arange(3), torch.tensor(2.0), tile=2)
    assert found.correct.tolist() == [True, True, False]  # a tie counts as found
    assert not found.correct.requires_grad


def test_what_is_not_finite_shows_in_the_loss():
    queries, documents, positives, scale = inputs(5, 8)
    documents[7, 0] = torch.nan
    assert info_nce(queries, documents, positives, scale, tile=3).loss_sum.isnan()


OWN = ([0, 0, 2, 6, 6, 6], [0, 1, 0, 0, 1, 2])
"""The row of each own negative, and how many of its row come before it."""


def plain_with_own(queries, documents, positives, scale, embeddings, masked, *, symmetric):
    """Return the sum over rows, each of which has columns of its own."""
    value = plain(queries, documents, positives, scale, symmetric=symmetric)
    for row, positive in enumerate(positives.tolist()):
        logits = scale * documents @ queries[row]
        mine = [n for n, owner in enumerate(OWN[0]) if owner == row and not masked[n]]
        further = scale * embeddings[mine] @ queries[row]
        weight = 0.5 if symmetric else 1
        more = torch.cat([logits, further]).logsumexp(0) - logits.logsumexp(0)
        assert 0 <= positive < len(documents)
        value = value + weight * more
    return value


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [None, [False, True, True, False, False, True]])
@pytest.mark.parametrize("tile", [3, 64])
def test_own_negatives_are_columns_of_their_row_only(tile, masked, symmetric):
    queries, documents, positives, scale = inputs(7, 12)
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(len(OWN[0]), 5, generator=generator, dtype=torch.float64)
    owners, places = map(torch.tensor, OWN)
    mask = None if masked is None else torch.tensor(masked)

    def tiled(q, d, s, e):
        own = OwnNegatives(e, owners, places, 3, mask)
        return info_nce(q, d, positives, s, symmetric=symmetric, own_negatives=own, tile=tile)

    found, expected = [], []
    for results, function in (
        (found, lambda *leaves: tiled(*leaves).loss_sum),
        (
            expected,
            lambda q, d, s, e: plain_with_own(
                q, d, positives, s, e, masked or [False] * 6, symmetric=symmetric
            ),
        ),
    ):
        leaves = [t.clone().requires_grad_() for t in (queries, documents, scale, embeddings)]
        value = function(*leaves)
        (3 * value).backward()
        results += [value.detach(), *(leaf.grad for leaf in leaves)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    result = tiled(queries, documents, scale, embeddings)
    torch.testing.assert_close(result.totals[0], expected[0])
    assert result.totals[2] == (0 if masked is None else 3)
    scores = queries @ documents.T
    best = scores.amax(1)
    for n, owner in enumerate(OWN[0]):
        if masked is None or not masked[n]:
            best[owner] = torch.maximum(best[owner], queries[owner] @ embeddings[n])
    own = scores[torch.arange(7), positives]
    assert result.correct.tolist() == (own >= best).tolist()
