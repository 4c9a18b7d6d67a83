"""Which pairs go to which rank, and that they arrive whole."""

import numpy as np
import pytest
from dist import run_ranks
from numerics.reference import random_texts

from largebatch.batch import Scores, Texts
from largebatch.parallel.collectives import Collectives
from largebatch.step import balance
from largebatch.step.balance import WORTHWHILE, Pairs, exchange_pairs, new_owners


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


def pairs_of(rank, layout, *, with_ids=True, with_counts=False, with_numbers=False):
    pairs, negatives = (numbers[rank] for numbers in SIZES[layout])
    if with_counts:  # of a rank without a pair no negative can be anyone's own
        negatives = pairs
    queries, documents, others = (
        Texts.from_lists(random_texts(number, longest=LONGEST[rank], seed=10 * rank + side))
        for side, number in enumerate((pairs, pairs, negatives))
    )
    counts = None
    if with_counts:
        owners = np.arange(negatives) % 3 % max(pairs, 1)
        counts = np.bincount(owners, minlength=pairs)
    ids = np.arange(pairs) + 100 * rank - 2**62 if with_ids else None
    labels = scores = None
    if with_numbers:  # with fractions, and as large and as small as they come
        generator = np.random.default_rng(rank)
        labels = generator.normal(size=pairs) * 10.0 ** generator.integers(-300, 300, pairs)
    if with_numbers and with_counts:
        scores = Scores(generator.normal(size=pairs), generator.normal(size=negatives))
    return Pairs(queries, documents, others, counts, ids, labels, scores)


def listed(pairs):
    """Return pairs with their ids and own negatives, and nobody's negatives, to be compared."""
    sides = [
        [tuple(text) for text in np.split(side.tokens, np.cumsum(side.lengths)[:-1])]
        if side.num_texts
        else []
        for side in pairs[:3]
    ]
    ids = [None] * len(sides[0]) if pairs.id_hashes is None else pairs.id_hashes.tolist()
    own = [()] * len(sides[0])
    numbers = [[None]] * len(own) if pairs.labels is None else pairs.labels[:, None].tolist()
    if pairs.negative_counts is not None:
        bounds = np.cumsum(pairs.negative_counts)
        assert (bounds[-1] if len(bounds) else 0) == len(sides[2])
        slices = [
            slice(end - count, end)
            for end, count in zip(bounds, pairs.negative_counts, strict=True)
        ]
        own = [tuple(sides[2][at]) for at in slices]
        if pairs.scores is not None:
            numbers = [
                [*before, score, *pairs.scores.negatives[at].tolist()]
                for before, score, at in zip(numbers, pairs.scores.documents, slices, strict=True)
            ]
        sides[2] = []
    numbers = [tuple(map(str, one)) for one in numbers]
    return list(zip(sides[0], sides[1], ids, own, numbers, strict=True)), sides[2]


def exchange(layout, knowledge):
    collectives = Collectives()
    pairs = exchange_pairs(pairs_of(collectives.world.rank, layout, **knowledge), collectives)
    return listed(pairs), int(pairs.tokens.sum()), pairs.queries.tokens.dtype


@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("with_numbers", [True, False])
def test_every_pair_and_negative_arrives_once_and_whole(
    layout, with_ids, with_counts, with_numbers
):
    knowledge = {"with_ids": with_ids, "with_counts": with_counts, "with_numbers": with_numbers}
    found = run_ranks(exchange, 3, layout, knowledge)
    given = [listed(pairs_of(rank, layout, **knowledge)) for rank in range(3)]
    for side in range(2):
        before = [one for parts in given for one in parts[side]]
        after = [one for parts, *_ in found for one in parts[side]]
        assert len(before) >= 3 or (with_counts and side == 1)
        assert sorted(before, key=str) == sorted(after, key=str)
    tokens = [number for _, number, _ in found]
    mean = sum(tokens) / 3
    # A pair goes with all that is its own, so these loads are fewer and larger.
    assert max(tokens) < (1.2 if with_counts else 1.1) * mean
    assert pairs_of(0, layout, **knowledge).tokens.sum() > 1.4 * mean
    assert [dtype for *_, dtype in found] == [np.int32] * 3
    if with_counts:
        assert {0} < {len(own) for pairs, _ in given for *_, own, _ in pairs} != {0, 1}
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
    pairs = pairs_of(0 if even else collectives.world.rank, "uneven")
    result = exchange_pairs(pairs, collectives)
    return len(calls), result is pairs


def test_even_parts_are_told_of_and_left():
    assert run_ranks(count, 2, True) == [(1, True)] * 2
    assert run_ranks(count, 2, False) == [(2, False)] * 2


def test_one_rank_is_told_nothing(monkeypatch):
    monkeypatch.setattr(balance, "new_owners", None)
    pairs = pairs_of(0, "even")
    assert exchange_pairs(pairs, Collectives()) is pairs


def different_knowledge(what):
    collectives = Collectives()
    knowledge = {what: collectives.world.rank == 0}
    exchange_pairs(pairs_of(0, "even", **knowledge), collectives)


@pytest.mark.parametrize("what", ["with_ids", "with_counts", "with_numbers"])
def test_ranks_must_know_alike(what):
    with pytest.raises(AssertionError, match="ranks know different things"):
        run_ranks(different_knowledge, 2, what)
