"""Which pairs go to which rank, and that they arrive whole."""

import numpy as np
import pytest
from dist import run_ranks
from numerics.reference import random_texts

from largebatch.batch import Texts
from largebatch.parallel.collectives import Collectives
from largebatch.step import balance
from largebatch.step.balance import WORTHWHILE, Part, even_out, new_owners


def sums(tokens, owners):
    """Return the tokens of each rank under its new things."""
    held = [0] * len(tokens)
    for own, new in zip(tokens, owners, strict=True):
        for number, rank in zip(own.tolist(), new.tolist(), strict=True):
            held[rank] += number
    return held


@pytest.mark.parametrize("size", [3, 8, 32])
@pytest.mark.parametrize("pairs", [16, 512])
def test_parts_become_even(size, pairs):
    generator = np.random.default_rng(size)
    tokens = [
        np.minimum(generator.lognormal(4, 0.8, pairs).astype(np.int64) + 2, 500)
        for _ in range(size)
    ]
    before = [int(own.sum()) for own in tokens]
    mean = sum(before) / size
    owners = new_owners(tokens)
    after = sums(tokens, owners)
    assert sum(after) == sum(before)
    assert max(before) > mean * (1 + WORTHWHILE)
    # By less than a text, or next to nothing.
    assert max(after) - mean < max(np.median(np.concatenate(tokens)), 0.005 * mean)
    for rank, new in enumerate(owners):
        assert new.min() >= 0
        assert new.max() < size
        # Nobody gives so much that it has less than the others; who has less than them gives none.
        assert (new == rank).all() or before[rank] > mean
    moved = sum((new != rank).sum() for rank, new in enumerate(owners))
    assert moved < 0.2 * size * pairs


def test_a_rank_without_anything_gets_its_share():
    tokens = [np.array([5, 4, 3, 2, 1, 1]), np.array([], np.int64)]
    assert sums(tokens, new_owners(tokens)) == [8, 8]


@pytest.mark.parametrize(("excess", "moves"), [(0.9, False), (1.5, True)])
def test_a_small_difference_is_left(excess, moves):
    more = round(100_000 * (1 + excess * WORTHWHILE))
    tokens = [np.full(more, 1), np.full(200_000 - more, 1)]
    owners = new_owners(tokens)
    assert any((new != rank).any() for rank, new in enumerate(owners)) == moves


def test_what_no_exchange_can_mend():
    one_long = [np.array([100]), np.array([10, 10])]
    assert [new.tolist() for new in new_owners(one_long)] == [[0], [1, 1]]
    nothing = [np.array([], np.int64)] * 2
    assert [len(new) for new in new_owners(nothing)] == [0, 0]
    empty_texts = [np.array([0, 8, 8]), np.array([0])]
    assert [new.tolist() for new in new_owners(empty_texts)] == [[0, 0, 1], [1]]


SIZES = {"even": ([6, 6, 6], [2, 2, 2]), "uneven": ([11, 1, 0], [0, 3, 0])}
LONGEST = (30, 4, 12)


def part_of(rank, layout, *, with_ids=True):
    pairs, negatives = (numbers[rank] for numbers in SIZES[layout])
    queries, documents, others = (
        Texts.from_lists(random_texts(number, longest=LONGEST[rank], seed=10 * rank + side))
        for side, number in enumerate((pairs, pairs, negatives))
    )
    return Part(
        queries, documents, others, np.arange(pairs) + 100 * rank - 2**62 if with_ids else None
    )


def listed(part):
    """Return pairs with their ids, and negatives, as what can be compared and sorted."""
    sides = [
        [tuple(text) for text in np.split(side.tokens, np.cumsum(side.lengths)[:-1])]
        if side.num_texts
        else []
        for side in part[:3]
    ]
    ids = [None] * len(sides[0]) if part.id_hashes is None else part.id_hashes.tolist()
    return list(zip(sides[0], sides[1], ids, strict=True)), sides[2]


def exchange(layout, with_ids):
    collectives = Collectives()
    part = even_out(part_of(collectives.world.rank, layout, with_ids=with_ids), collectives)
    return listed(part), int(part.tokens.sum()), part.queries.tokens.dtype


@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("with_ids", [True, False])
def test_every_pair_and_negative_arrives_once_and_whole(layout, with_ids):
    found = run_ranks(exchange, 3, layout, with_ids)
    given = [listed(part_of(rank, layout, with_ids=with_ids)) for rank in range(3)]
    for side in range(2):
        before = [one for parts in given for one in parts[side]]
        after = [one for parts, *_ in found for one in parts[side]]
        assert len(before) >= 3
        assert sorted(before, key=str) == sorted(after, key=str)
    tokens = [number for _, number, _ in found]
    assert max(tokens) < 1.1 * sum(tokens) / 3
    assert [dtype for *_, dtype in found] == [np.int32] * 3
    # They really moved.
    assert [parts for parts, *_ in found] != given


def count(even):
    collectives = Collectives()
    calls = []
    plain = Collectives.gather_ragged

    def counted(self, values, **options):
        calls.append(len(values))
        return plain(self, values, **options)

    Collectives.gather_ragged = counted
    part = part_of(0 if even else collectives.world.rank, "uneven")
    result = even_out(part, collectives)
    return len(calls), result is part


def test_even_parts_are_told_of_and_left():
    assert run_ranks(count, 2, True) == [(1, True)] * 2
    assert run_ranks(count, 2, False) == [(2, False)] * 2


def test_one_rank_is_told_nothing(monkeypatch):
    monkeypatch.setattr(balance, "new_owners", None)
    part = part_of(0, "even")
    assert even_out(part, Collectives()) is part


def different_knowledge():
    collectives = Collectives()
    even_out(part_of(0, "even", with_ids=collectives.world.rank == 0), collectives)


def test_ranks_must_know_alike():
    with pytest.raises(AssertionError, match="ranks know different things"):
        run_ranks(different_knowledge, 2)
