"""The mixture: which source gives which draw of a run. Pure arithmetic.

A draw is a batch, where batches are from one source, or a row, where they are mixed.

The k-th draw of a source with the share w of all draws lies at the time (k + u) / w, with a u in
[0, 1) drawn for each k; draws of all sources are taken in the order of their times. So each source
has had its share of any stretch of draws but for one draw, in an order without a pattern, and what
came before a draw can be counted without going through it.

Where shares change (an entry of the curriculum, a source that has given all that it may), a new
interval begins, whose times start from 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """Some draws of a run, in order."""

    sources: IndexArray
    """`[n]`, number of the source that gives each."""
    numbers: IndexArray
    """`[n]`, how many draws that source gave before."""


class ShareInterval(NamedTuple):
    """A stretch of draws with the same shares."""

    first_draw: int
    """Where it begins."""
    shares: tuple[float, ...]
    """`[S]`, of each source; they add up to 1."""
    given: tuple[int, ...]
    """`[S]`, draws that each source gave before it."""


class Mixture:
    """Which source gives which draw.

    Args:
        weights: From which draw on each source has which weight: pairs of a draw and `[S]`
            numbers, in order; the first draw is 0.
        max_draws: `[S]`, most draws that each source gives, or None.
        seed: Decides the order.

    `num_draws` is how many draws there are, or None if they never end.
    """

    def __init__(
        self,
        weights: Sequence[tuple[int, Sequence[float]]],
        *,
        max_draws: Sequence[int | None],
        seed: int,
    ) -> None:
        assert weights[0][0] == 0
        self.seed = seed
        self.num_draws: int | None = None
        self.intervals: list[ShareInterval] = []
        self._max_draws = max_draws
        self._plan_intervals(weights)

    def draws(self, first: int, stop: int) -> Draws:
        """Return the draws from `first` to `stop - 1`, which must be there."""
        assert first <= stop
        assert self.num_draws is None or stop <= self.num_draws
        parts = []
        while first < stop:
            number = self._interval_number(first)
            interval = self.intervals[number]
            last = number + 1 == len(self.intervals)
            end = stop if last else min(stop, self.intervals[number + 1].first_draw)
            parts.append(self._draws_in_interval(number, first - interval.first_draw, end - first))
            first = end
        if not parts:
            return Draws(np.empty(0, np.int64), np.empty(0, np.int64))
        return Draws(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def given(self, draw: int) -> IndexArray:
        """Return `[S]` how many draws each source gives before `draw`."""
        number = self._interval_number(draw)
        interval = self.intervals[number]
        counts = np.array(interval.given, np.int64)
        local = draw - interval.first_draw
        # A few draws before it, counted one by one; those before them, by their times.
        time = float(max(0, local - len(counts)))
        counts_then = self._counts(number, time)
        rest = self._draws_in_interval(
            number, int(counts_then.sum()), local - int(counts_then.sum())
        )
        counts += counts_then
        np.add.at(counts, rest.sources, 1)
        return counts

    def shares(self, draw: int) -> tuple[float, ...]:
        """Return `[S]` the share that each source should have of the draws around `draw`."""
        return self.intervals[self._interval_number(draw)].shares

    def _plan_intervals(self, weights: Sequence[tuple[int, Sequence[float]]]) -> None:
        given = np.zeros(len(weights[0][1]), np.int64)
        for i, (first, values) in enumerate(weights):
            stop = weights[i + 1][0] if i + 1 < len(weights) else None
            draw = first
            while stop is None or draw < stop:
                active = [
                    0.0 if most is not None and gave >= most else float(weight)
                    for weight, gave, most in zip(values, given, self._max_draws, strict=True)
                ]
                total = math.fsum(active)
                if total == 0:
                    self.num_draws = draw
                    if not self.intervals:  # an empty one, so that there is always one to look at
                        self.intervals.append(
                            ShareInterval(0, tuple(active), tuple(given.tolist()))
                        )
                    return
                shares = tuple(weight / total for weight in active)
                self.intervals.append(ShareInterval(draw, shares, tuple(given.tolist())))
                ends = self._first_exhausted(len(self.intervals) - 1)
                if ends is None or (stop is not None and draw + ends >= stop):
                    break
                draw += ends
                given = self.given(draw)
            if stop is not None:
                given = self.given(stop)

    def _first_exhausted(self, number: int) -> int | None:
        """Return after how many draws of an interval the first source has given all that it may."""
        interval = self.intervals[number]
        first: tuple[float, int] | None = None
        for source, most in enumerate(self._max_draws):
            if most is not None and interval.shares[source] > 0:
                last = np.array([most - interval.given[source] - 1], np.int64)
                time = float(self._times(number, source, last)[0])
                first = (time, source) if first is None else min(first, (time, source))
        if first is None:
            return None
        time, source = first
        before = int(self._counts(number, time).sum())
        # Draws at exactly this time come in the order of their sources.
        while True:
            draw = self._draws_in_interval(number, before, 1)
            before += 1
            if draw.sources[0] == source:
                return before

    def _interval_number(self, draw: int) -> int:
        assert draw >= 0
        return sum(interval.first_draw <= draw for interval in self.intervals) - 1

    def _draws_in_interval(self, number: int, first: int, count: int) -> Draws:
        """Return draws of an interval, counted from its begin."""
        interval = self.intervals[number]
        # Up to any time each source has given at most one draw more or less than its share of it,
        # so these two times enclose the draws in question.
        num_sources = len(interval.shares)
        begin = self._counts(number, float(max(0, first - num_sources)))
        end = self._counts(number, float(first + count + num_sources + 1))
        sources = np.repeat(np.arange(num_sources), end - begin)
        numbers = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        times = np.concatenate(
            [
                self._times(number, source, np.arange(begin[source], end[source]))
                for source in range(num_sources)
            ]
        )
        order = np.argsort(times, kind="stable")  # equal times: in the order of the sources
        skip = first - int(begin.sum())
        chosen = order[skip : skip + count]
        assert skip >= 0
        assert len(chosen) == count
        given = np.array(interval.given, np.int64)
        return Draws(sources[chosen], numbers[chosen] + given[sources[chosen]])

    def _counts(self, number: int, time: float) -> IndexArray:
        """Return `[S]` how many draws of each source in an interval lie before a time."""
        counts = np.zeros(len(self.intervals[number].shares), np.int64)
        for source, share in enumerate(self.intervals[number].shares):
            if share == 0:
                continue
            # One of these three is the first that does not; rounding decides which, here as there.
            near = max(0, math.floor(share * time) - 1)
            candidates = np.arange(near, near + 3)
            before = self._times(number, source, candidates) < time
            counts[source] = near + int(before.sum())
        return counts

    def _times(self, number: int, source: int, numbers: IndexArray) -> npt.NDArray[np.float64]:
        share = self.intervals[number].shares[source]
        if len(numbers) == 0:
            return np.empty(0)
        drawn = _uniform(_mix(_mix(_mix(self.seed) ^ (number + 1)) ^ (source + 1)), numbers)
        return (numbers + drawn) / share


_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """Return 64 well-mixed bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _uniform(key: int, numbers: IndexArray) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each of `numbers`: SplitMix64's, at that place of its row."""
    # Hashed, and not drawn by a generator, since any of them must be had without those before.
    state = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = state ^ (state >> np.uint64(31))
    # 32 bits, so that k + u is exact up to 2 million draws; beyond, u is rounded, on all machines
    # alike.
    return (bits >> np.uint64(32)).astype(np.float64) * 2.0**-32
