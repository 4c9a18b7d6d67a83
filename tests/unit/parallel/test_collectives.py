"""Collectives: right on several ranks with unequal parts, the identity on one."""

import numpy as np
import pytest
import torch
from collective_counts import counted
from dist import run_ranks

from largebatch.errors import UserError
from largebatch.parallel.collectives import Collectives
from largebatch.world import World

WIDTH = 3


def rows_of(rank, counts):
    """Return a rank's part of one matrix."""
    matrix = torch.arange(sum(counts) * WIDTH, dtype=torch.float64).view(-1, WIDTH)
    return matrix.split(counts)[rank].clone()


def gather(counts):
    """Gather, weigh each row differently on each rank, and return rows and own gradient."""
    collectives = Collectives()
    rank = collectives.world.rank
    own = rows_of(rank, counts).requires_grad_()
    gathered = collectives.gather_rows(own, counts)
    weights = torch.arange(1.0, sum(counts) + 1, dtype=torch.float64)[:, None] * (rank + 1)
    (gathered.rows * weights).sum().backward()
    return gathered.rows, gathered.counts, own.grad


@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [0, 2], [4, 0, 1], [1, 2, 3, 2]])
def test_gather_rows_and_its_gradient(counts):
    results = run_ranks(gather, len(counts), counts)
    whole = np.arange(sum(counts) * WIDTH, dtype=np.float64).reshape(-1, WIDTH)
    total = sum(range(1, len(counts) + 1))  # what the ranks' weights add up to
    ends = np.cumsum(counts)
    for rank, (rows, found_counts, grad) in enumerate(results):
        np.testing.assert_array_equal(rows, whole)
        assert found_counts == counts
        own = np.arange(1.0, sum(counts) + 1)[ends[rank] - counts[rank] : ends[rank], None] * total
        np.testing.assert_array_equal(grad, np.broadcast_to(own, (counts[rank], WIDTH)))


def combine(values):
    collectives = Collectives()
    own = torch.tensor(values[collectives.world.rank], dtype=torch.float64)
    before = own.clone()
    sums = torch.tensor([1.0, 10.0], dtype=torch.float64) * (collectives.world.rank + 1)
    out = collectives.combine(own, own, sums)
    torch.testing.assert_close(own, before, rtol=0, atol=0, equal_nan=True)
    return out


def test_combine():
    inf = float("inf")
    # Large numbers, a column that one rank has no row for, and one that no rank has.
    values = [[1.0, 2000.0, -inf, -inf], [2.0, 1999.0, 5.0, -inf], [0.0, -3.0, -inf, -inf]]
    expected = torch.tensor(values, dtype=torch.float64)
    for logsumexps, highest, sums in run_ranks(combine, 3, values):
        np.testing.assert_allclose(logsumexps, expected.logsumexp(0).numpy(), rtol=1e-15)
        assert logsumexps[3] == -inf
        np.testing.assert_array_equal(highest, expected.amax(0).numpy())
        assert sums.tolist() == [6, 60]


def test_combine_sums_only():
    for logsumexps, highest, sums in run_ranks(combine, 2, [[], []]):
        assert len(logsumexps) == len(highest) == 0
        assert sums.tolist() == [3, 30]


def test_what_is_not_finite_stays_so():
    found = run_ranks(combine, 2, [[float("nan")], [1.0]])
    assert all(np.isnan(logsumexps).all() for logsumexps, _, _ in found)


def gather_ragged(steps):
    """Gather several times; return what came back and how many all-gathers each took."""
    collectives = Collectives()
    rank = collectives.world.rank
    results = []
    for numbers in steps:
        values = np.arange(numbers[rank]) + (1 << 62) + 1000 * rank
        with counted() as calls:
            parts = collectives.gather_ragged(values)
        results.append(([part.tolist() for part in parts], len(calls)))
    return results


def test_gather_ragged_takes_a_second_round_only_where_there_is_more_than_ever():
    steps = [[2, 0, 1], [2, 5, 3], [8, 1, 0], [9, 9, 9], [3, 16, 2], [0, 0, 0]]
    for found in run_ranks(gather_ragged, 3, steps):
        for (parts, _), numbers in zip(found, steps, strict=True):
            assert parts == [
                [(1 << 62) + 1000 * rank + k for k in range(number)]
                for rank, number in enumerate(numbers)
            ]
        # Room for 3, then for 8, then for 16.
        assert [calls for _, calls in found] == [1, 2, 1, 2, 1, 1]


def small_ones():
    collectives = Collectives()
    rank = collectives.world.rank
    numbers = torch.tensor([rank, 10 * rank])
    sent = torch.tensor([float(rank + 7)])
    collectives.broadcast_(sent)
    collectives.barrier()
    return (
        collectives.world,
        collectives.sum(numbers).tolist(),
        collectives.max(numbers).tolist(),
        numbers.tolist(),
        float(sent),
        collectives.gather_objects({"rank": rank}),
        collectives.on_main(lambda: f"from {rank}"),
    )


def test_small_ones_on_three_ranks():
    for rank, found in enumerate(run_ranks(small_ones, 3)):
        assert found == (
            World(rank=rank, size=3),
            [3, 30],
            [2, 20],
            [rank, 10 * rank],  # what was given is left as it was
            7.0,
            [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "from 0",
        )


def test_identity_without_a_process_group():
    world, *rest = small_ones()
    assert world == World()
    assert rest == [[0, 0], [0, 0], [0, 0], 7.0, [{"rank": 0}], "from 0"]
    rows = torch.ones(2, 3, requires_grad=True)
    collectives = Collectives()
    assert collectives.gather_rows(rows, [2]).rows is rows
    assert collectives.combine(rows, rows, rows) == (rows, rows, rows)
    numbers = np.arange(3)
    (values,) = collectives.gather_ragged(numbers)
    assert values is numbers


def fail_on_main():
    def action():
        raise UserError("only rank 0 sees this")

    with pytest.raises(UserError) as caught:
        Collectives().on_main(action)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 3])
def test_all_ranks_fail_together(size):
    found = [fail_on_main()] if size == 1 else run_ranks(fail_on_main, size)
    assert found == ["only rank 0 sees this"] * size


def fail_on(ranks, error):
    collectives = Collectives()

    def action():
        if collectives.world.rank in ranks:
            raise error
        return collectives.world.rank

    try:
        return collectives.all_succeed(action)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"


def test_all_ranks_fail_where_one_does():
    assert run_ranks(fail_on, 3, [], None) == [0, 1, 2]
    one_line = "UserError: bad file"
    assert run_ranks(fail_on, 3, [1, 2], UserError("bad file")) == [one_line] * 3
    told = "RuntimeError: rank 2 failed: KeyError: 'x'"
    assert run_ranks(fail_on, 3, [2], KeyError("x")) == [told, told, "KeyError: 'x'"]
    assert fail_on([0], KeyError("x")) == "KeyError: 'x'"


def test_rows_must_be_as_many_as_were_told():
    with pytest.raises(AssertionError):
        Collectives().gather_rows(torch.ones(2, 3), [3])
