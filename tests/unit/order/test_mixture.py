"""The mixture: shares kept at every step, counted without going through what came before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.order.mixture import Mixture

WEIGHTS = st.lists(st.floats(0.001, 100), min_size=1, max_size=7)


@st.composite
def mixtures(draw):
    first = draw(WEIGHTS)
    changes = [(0, first)]
    for begin in sorted(set(draw(st.lists(st.integers(1, 300), max_size=3)))):
        # A weight of 0 leaves a source out for a while, but never all of them.
        weights = [draw(st.sampled_from([0.0, weight, 3.0])) for weight in first]
        changes.append((begin, weights if any(weights) else first))
    most = [draw(st.one_of(st.none(), st.integers(0, 120))) for _ in first]
    return Mixture(changes, max_draws=most, seed=draw(st.integers(0, 2**40))), changes, most


def length(mixture):
    return 400 if mixture.num_draws is None else min(mixture.num_draws, 400)


@settings(max_examples=150, deadline=None)
@given(mixtures())
def test_each_source_gives_its_units_in_turn_each_once(drawn):
    mixture, _, most = drawn
    draws = mixture.draws(0, length(mixture))
    for source, limit in enumerate(most):
        numbers = draws.numbers[draws.sources == source].tolist()
        assert numbers == list(range(len(numbers)))
        assert limit is None or len(numbers) <= limit
    if mixture.num_draws is not None and mixture.num_draws <= 400:
        # The end comes when no source that has a weight then has draws left.
        weights = [weights for draw, weights in drawn[1] if draw <= mixture.num_draws][-1]
        gave_in_all = np.bincount(draws.sources, minlength=len(most)).tolist()
        for weight, gave, limit in zip(weights, gave_in_all, most, strict=True):
            assert weight == 0 or gave == limit


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.data())
def test_seeking_equals_replaying(drawn, data):
    mixture = drawn[0]
    stop = length(mixture)
    whole = mixture.draws(0, stop)
    first = data.draw(st.integers(0, stop))
    last = data.draw(st.integers(first, stop))
    part = mixture.draws(first, last)
    assert part.sources.tolist() == whole.sources[first:last].tolist()
    assert part.numbers.tolist() == whole.numbers[first:last].tolist()
    counted = np.bincount(whole.sources[:first], minlength=len(drawn[2]))
    assert mixture.given(first).tolist() == counted.tolist()


@settings(max_examples=100, deadline=None)
@given(mixtures())
def test_shares_are_kept_in_every_phase(drawn):
    mixture = drawn[0]
    stop = length(mixture)
    sources = mixture.draws(0, stop).sources
    for interval, end in zip(
        mixture.intervals, [*(p.first_draw for p in mixture.intervals[1:]), stop], strict=True
    ):
        for draw in range(interval.first_draw, min(end, stop)):
            in_phase = sources[interval.first_draw : draw + 1]
            counts = np.bincount(in_phase, minlength=len(interval.shares))
            wanted = np.array(interval.shares) * len(in_phase)
            # Each source is within one draw of its share at any time, so at any count within as
            # many as there are sources.
            assert np.abs(counts - wanted).max() <= len(interval.shares)
        assert sum(interval.shares) == (pytest.approx(1) if mixture.num_draws != 0 else 0)


def test_a_change_of_weights_holds_from_its_unit_on():
    mixture = Mixture([(0, [1, 0]), (10, [0, 1])], max_draws=[None, None], seed=3)
    assert mixture.draws(0, 20).sources.tolist() == [0] * 10 + [1] * 10
    assert mixture.shares(9) == (1, 0)
    assert mixture.shares(10) == (0, 1)


def test_a_source_that_has_given_all_leaves_its_share_to_the_others():
    mixture = Mixture([(0, [2, 1, 1])], max_draws=[10, None, None], seed=3)
    sources = mixture.draws(0, 1000).sources
    last = int(np.flatnonzero(sources == 0)[-1])
    assert (sources == 0).sum() == 10
    assert 15 <= last <= 25
    assert mixture.shares(last) == (0.5, 0.25, 0.25)
    assert mixture.shares(last + 1) == (0, 0.5, 0.5)
    assert mixture.num_draws is None


def test_the_end_when_all_have_given_all():
    mixture = Mixture([(0, [2, 1])], max_draws=[5, 7], seed=3)
    assert mixture.num_draws == 12
    assert Mixture([(0, [2, 1])], max_draws=[0, 7], seed=3).num_draws == 7


def test_the_order_has_no_pattern_and_depends_on_the_seed():
    weights = [(0, [1.0, 1.0])]
    one, two = (Mixture(weights, max_draws=[None, None], seed=seed) for seed in (0, 1))
    sources = one.draws(0, 1000).sources
    assert (sources != two.draws(0, 1000).sources).sum() > 300
    same_as_before = int((sources[1:] == sources[:-1]).sum())
    assert 200 < same_as_before < 450  # round robin: 0; independent draws: 500


def test_golden_order():
    """Numbers that must never change: a resumed run would see other batches."""
    mixture = Mixture([(0, [3, 1, 0.5])], max_draws=[None] * 3, seed=42)
    assert "".join(map(str, mixture.draws(0, 40).sources)) == GOLDEN
    assert "".join(map(str, mixture.draws(10**9, 10**9 + 40).sources)) == GOLDEN_FAR
    assert mixture.given(10**9).tolist() == GOLDEN_GIVEN


GOLDEN = "0102000011020001000100020100120000100120"
GOLDEN_FAR = "0100001000102001000100021001020001000120"
GOLDEN_GIVEN = [666666666, 222222222, 111111112]
