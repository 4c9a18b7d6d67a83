"""Log-sum-exps over candidates equal the plain formula: value, every gradient, any tile."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largebatch.losses import candidates as module
from largebatch.losses.candidates import (
    Candidates,
    log_sum_exp,
    log_sum_exps,
    losses_of_rows,
    own_log_sum_exps,
)
from largebatch.losses.infonce import OwnNegatives
from largebatch.losses.masks import ScoreLimits, score_limits

B, M, D, G = 7, 23, 5, 4
RANGES = {"far": (slice(2, 9), slice(11, 20)), "near": (slice(0, 12),)}


class Planted:
    """False negatives as a whole matrix."""

    def __init__(self, mask_bc):
        self.mask_bc = mask_bc

    def fill_(self, tile_rc, rows, columns, value):
        mask = self.mask_bc[rows, columns]
        tile_rc.masked_fill_(mask, value)
        return mask


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def inputs():
    """Return queries, documents, columns and a scale."""
    return [unit(B, D, seed=0), unit(B, D, seed=1), unit(M, D, seed=2), torch.tensor(3.0).double()]


def kinds(*, masked=True):
    """Return a kind for each side, and a second one for the first."""
    made = []
    for seed, (side, name, first) in enumerate([(0, "far", 4), (1, "near", 0), (0, "near", 5)]):
        number = sum(one.stop - one.start for one in RANGES[name])
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(B, number, generator=generator) < 0.2
        own = torch.arange(first, first + B)
        mask[torch.arange(B), own] = False  # as FalseNegatives does
        made.append(Candidates(side, RANGES[name], own, Planted(mask) if masked else None))
    return made


def limits_of(kind):
    if kind == "none":
        return None
    highest = torch.linspace(-0.2, 0.7, B, dtype=torch.float64)
    if kind == "scores":
        return ScoreLimits(highest)
    return ScoreLimits(highest, [unit(B, G, seed=3), unit(B, G, seed=4)], unit(M, G, seed=5))


def plain(queries, documents, columns, scale, made, limits):
    """Return log-sum-exps, highest logits and how many are masked, with whole matrices."""
    values, highest, masked = [], [], 0
    for kind in made:
        index = torch.cat([torch.arange(one.start, one.stop) for one in kind.ranges])
        scores = (queries, documents)[kind.side] @ columns[index].T
        out = torch.zeros(scores.shape, dtype=torch.bool)
        if kind.false_negatives is not None:
            out |= kind.false_negatives.mask_bc
        if limits is not None:
            judged = scores.detach()
            if limits.columns_mg is not None:
                judged = limits.sides[kind.side] @ limits.columns_mg[index].T
            out |= judged > limits.highest_b[:, None]
        own = F.one_hot(kind.own_b, len(index)).bool()
        masked += int((out & ~own).sum())
        logits = scale * scores + kind.hardness * scores.detach()
        values.append(logits.masked_fill(out | own, -torch.inf).logsumexp(1))
        highest.append((scale * scores).detach().masked_fill(out | own, -torch.inf).amax(1))
    return torch.stack(values), torch.stack(highest), torch.tensor(masked)


WEIGHTS = torch.linspace(0.5, 2, 3 * B, dtype=torch.float64).view(3, B)


def value_and_gradients(function):
    leaves = [one.clone().requires_grad_() for one in inputs()]
    values, highest, masked = function(*leaves)
    values = torch.where(values.isneginf(), 0, values)
    (WEIGHTS * values).sum().backward()
    return [values.detach(), highest, *(leaf.grad for leaf in leaves)], int(masked.sum())


@pytest.mark.parametrize("hardness", [0.0, 5.0])
@pytest.mark.parametrize("limits", ["none", "scores", "guide"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [1, 3, 64])
def test_equals_the_plain_formula(tile, masked, limits, hardness):
    made, limit = kinds(masked=masked), limits_of(limits)
    made[1] = made[1]._replace(hardness=hardness)
    expected, number = value_and_gradients(lambda *leaves: plain(*leaves, made, limit))
    found, counted = value_and_gradients(
        lambda q, d, c, s: log_sum_exps([q, d], c, s, made, limits=limit, tile=tile)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert counted == number
    assert (number > 0) == (masked or limits != "none")


def test_gradcheck():
    made = kinds()
    leaves = [one.requires_grad_() for one in inputs()]
    assert torch.autograd.gradcheck(
        lambda q, d, c, s: log_sum_exps([q, d], c, s, made, tile=4).values_kb, leaves
    )


@pytest.mark.parametrize("limits", ["scores", "guide"])
def test_transposed_limits_are_seen(limits, monkeypatch):
    made, limit = kinds()[1:2], limits_of(limits)
    made = [made[0]._replace(ranges=(slice(0, B),), false_negatives=None)]
    expected = plain(*inputs(), made, limit)[0]
    q, d, c, s = inputs()
    torch.testing.assert_close(log_sum_exps([q, d], c, s, made, limits=limit).values_kb, expected)
    plain_beyond = module._Tiles.beyond

    def transposed(self, kind, rows, columns, logits, spare):
        found = plain_beyond(self, kind, rows, columns, logits, spare)
        return found.T.contiguous()

    monkeypatch.setattr(module._Tiles, "beyond", transposed)
    wrong = log_sum_exps([q, d], c, s, made, limits=limit).values_kb
    assert (wrong - expected).abs().max() > 1e-3


def test_rows_with_nothing_left_have_no_gradient():
    q, d, c, s = [one.requires_grad_() for one in inputs()]
    limits = ScoreLimits(torch.tensor([-2.0] * 3 + [2.0] * (B - 3)).double())
    found = log_sum_exps([q, d], c, s, kinds(), limits=limits, tile=5)
    losses = losses_of_rows((q * d).sum(1), log_sum_exp(found.values_kb))
    losses.sum().backward()
    assert found.values_kb[:, :3].isneginf().all()
    assert losses[:3].tolist() == [0, 0, 0]
    for leaf in (q, d):
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[:3] == 0).all()
        assert (leaf.grad[3:] != 0).all()
    assert c.grad.isfinite().all()


def test_no_rows_reach_the_columns():
    _, _, c, s = [one.requires_grad_() for one in inputs()]
    none = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    made = [Candidates(0, RANGES["far"], torch.empty(0, dtype=torch.int64))]
    log_sum_exps([none, none], c, s, made).values_kb.sum().backward()
    assert (c.grad == 0).all()
    assert s.grad == 0


class _LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_never_holds_more_than_a_tile():
    b, m, tile = 100, 130, 32
    sides = [unit(b, 4, seed=n).requires_grad_() for n in range(2)]
    columns = unit(m, 4, seed=2).requires_grad_()
    made = [Candidates(n, (slice(0, 60), slice(70, m)), torch.arange(b)) for n in range(2)]
    limits = ScoreLimits(torch.full((b,), 0.5).double(), [one.detach() for one in sides], columns)
    limits = limits._replace(columns_mg=columns.detach())
    with _LargestTensor() as seen:
        found = log_sum_exps(
            sides, columns, torch.tensor(2.0).double(), made, limits=limits, tile=tile
        )
        found.values_kb.sum().backward()
    assert seen.largest <= max(tile * tile, m * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_tile_by_tile(dtype):
    given = [one.to(dtype) for one in inputs()[:3]]
    made = kinds()
    found = [one.clone().requires_grad_() for one in given]
    q, d, c = found
    values = log_sum_exps([q, d], c, torch.tensor(3.0), made, tile=4).values_kb
    assert values.dtype == torch.float32
    (WEIGHTS * values).sum().backward()
    exact = [one.double().requires_grad_() for one in given]
    expected = plain(*exact, torch.tensor(3.0).double(), made, None)[0]
    (WEIGHTS * expected).sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    for one, reference in zip(found, exact, strict=True):
        half_a_unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            one.grad.double(), reference.grad, rtol=1.01 * half_a_unit, atol=1e-6
        )


@pytest.mark.parametrize("noise", [0.5, 0.2])
@pytest.mark.parametrize("times", [1, 2])
def test_float32_with_confident_positives(noise, times):
    """Mean losses down to 1e-10, where P - 1 in float32 would be nothing but rounding."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(200, 64, generator=generator), dim=1)
    documents = queries + noise / 2 * torch.randn(200, 64, generator=generator)
    documents = F.normalize(documents, dim=1)
    found, expected = [], []
    for results, dtype in ((found, torch.float32), (expected, torch.float64)):
        q, d = (one.to(dtype, copy=True).requires_grad_() for one in (queries, documents))
        scale = torch.tensor(100.0, dtype=dtype, requires_grad=True)
        made = [Candidates(0, (slice(0, 200),), torch.arange(200))]
        others = log_sum_exps([q, d], d, scale, made, tile=64).values_kb[0]
        losses = losses_of_rows(scale * (q * d).sum(1), others, times=times)
        losses.sum().backward()
        results += [losses.detach().sum(), q.grad, d.grad, scale.grad]
    for measured, reference in zip(found, expected, strict=True):
        assert (measured - reference).norm() < 1e-5 * reference.norm()
        assert reference.norm() > 0


@pytest.mark.parametrize("times", [1, 2])
def test_the_loss_of_a_row_is_that_of_its_softmax(times):
    positive, others = torch.tensor([0.3, 2.0]), torch.tensor([1.0, -torch.inf])
    expected = (times * positive.exp() + others.exp()).log() - positive
    torch.testing.assert_close(losses_of_rows(positive, others, times=times), expected)


OWN = ([0, 0, 2, 6, 6, 6], [0, 1, 0, 0, 1, 2])


@pytest.mark.parametrize("hardness", [0.0, 5.0])
@pytest.mark.parametrize("limits", ["none", "scores", "guide"])
@pytest.mark.parametrize("masked", [None, [False, True, True, False, False, True]])
def test_own_negatives_are_candidates_of_their_row_only(masked, limits, hardness):
    queries, _, _, scale = inputs()
    embeddings, guided = unit(6, D, seed=7), unit(6, G, seed=8)
    owners, places = map(torch.tensor, OWN)
    limit = limits_of(limits)
    if limits == "guide":
        limit = limit._replace(columns_mg=guided)
    results = []
    for plainly in (False, True):
        leaves = [one.clone().requires_grad_() for one in (queries, embeddings, scale)]
        q, e, s = leaves
        if plainly:
            rows, count = [], 0
            for row in range(B):
                own = []
                for n in range(6):
                    judged = q[row] @ e[n] if limits != "guide" else limit.sides[0][row] @ guided[n]
                    out = masked is not None and masked[n]
                    out |= limit is not None and bool(judged > limit.highest_b[row])
                    if OWN[0][n] == row:
                        count += out
                        score = q[row] @ e[n]
                        own += [] if out else [s * score + hardness * score.detach()]
                rows.append(torch.stack(own).logsumexp(0) if own else s * 0 - torch.inf)
            values = torch.stack(rows)
        else:
            mask = None if masked is None else torch.tensor(masked)
            own = OwnNegatives(e, owners, places, 3, mask)
            found = own_log_sum_exps(q, s, own, limits=limit, hardness=hardness)
            values, count = found.values_kb[0], int(found.masked.sum())
        torch.where(values.isneginf(), 0, values).sum().backward()
        results.append([values.detach(), *(leaf.grad for leaf in leaves), torch.tensor(count)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_limits_of_scores():
    positives = torch.tensor([0.8, 0.0, -0.5], requires_grad=True)
    found = score_limits(positives, margin=-0.1)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.tensor([0.7, -0.1, -0.6]))
    # A share of what is below 0 lies below it, too.
    torch.testing.assert_close(score_limits(positives, share=0.9), torch.tensor([0.72, 0, -0.55]))
    both = score_limits(positives, margin=-0.07, share=0.9)
    torch.testing.assert_close(both, torch.tensor([0.72, -0.07, -0.57]))
