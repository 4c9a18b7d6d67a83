"""The mixture: which source gives which unit of a run. Pure arithmetic.

A unit is a batch, where batches are from one source, or a row, where they are mixed.

The k-th unit of a source with the share w of all units lies at the time (k + u) / w, with a u in
[0, 1) drawn for each k; units of all sources are taken in the order of their times. So each source
has had its share of any stretch of units but for one unit, in an order without a pattern, and what
came before a unit can be counted without going through it.

Where shares change (an entry of the curriculum, a source that has given all that it may), a new
phase begins, whose times start from 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


class Units(NamedTuple):
    """Some units of a run, in order."""

    sources: IndexArray
    """`[n]`, number of the source that gives each."""
    numbers: IndexArray
    """`[n]`, how many units that source gave before."""


class Phase(NamedTuple):
    """A stretch of units with the same shares."""

    first_unit: int
    """Where it begins."""
    shares: tuple[float, ...]
    """`[S]`, of each source; they add up to 1."""
    given: tuple[int, ...]
    """`[S]`, units that each source gave before it."""


class Mixture:
    """Which source gives which unit.

    Args:
        weights: From which unit on each source has which weight: pairs of a unit and `[S]`
            numbers, in order; the first unit is 0.
        most_units: `[S]`, most units that each source gives, or None.
        seed: Decides the order.

    `num_units` is how many units there are, or None if they never end.
    """

    def __init__(
        self,
        weights: Sequence[tuple[int, Sequence[float]]],
        *,
        most_units: Sequence[int | None],
        seed: int,
    ) -> None:
        assert weights[0][0] == 0
        self.seed = seed
        self.num_units: int | None = None
        self.phases: list[Phase] = []
        self._most_units = most_units
        self._plan_phases(weights)

    def units(self, first: int, stop: int) -> Units:
        """Return the units from `first` to `stop - 1`, which must be there."""
        assert first <= stop
        assert self.num_units is None or stop <= self.num_units
        parts = []
        while first < stop:
            number = self._phase_number(first)
            phase = self.phases[number]
            last = number + 1 == len(self.phases)
            end = stop if last else min(stop, self.phases[number + 1].first_unit)
            parts.append(self._units_in_phase(number, first - phase.first_unit, end - first))
            first = end
        if not parts:
            return Units(np.empty(0, np.int64), np.empty(0, np.int64))
        return Units(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def given(self, unit: int) -> IndexArray:
        """Return `[S]` how many units each source gives before `unit`."""
        number = self._phase_number(unit)
        phase = self.phases[number]
        counts = np.array(phase.given, np.int64)
        local = unit - phase.first_unit
        # A few units before it, counted one by one; those before them, by their times.
        time = float(max(0, local - len(counts)))
        counts_then = self._counts(number, time)
        rest = self._units_in_phase(number, int(counts_then.sum()), local - int(counts_then.sum()))
        counts += counts_then
        np.add.at(counts, rest.sources, 1)
        return counts

    def shares(self, unit: int) -> tuple[float, ...]:
        """Return `[S]` the share that each source should have of the units around `unit`."""
        return self.phases[self._phase_number(unit)].shares

    def _plan_phases(self, weights: Sequence[tuple[int, Sequence[float]]]) -> None:
        given = np.zeros(len(weights[0][1]), np.int64)
        for i, (first, values) in enumerate(weights):
            stop = weights[i + 1][0] if i + 1 < len(weights) else None
            unit = first
            while stop is None or unit < stop:
                active = [
                    0.0 if most is not None and gave >= most else float(weight)
                    for weight, gave, most in zip(values, given, self._most_units, strict=True)
                ]
                total = math.fsum(active)
                if total == 0:
                    self.num_units = unit
                    if not self.phases:  # an empty one, so that there is always one to look at
                        self.phases.append(Phase(0, tuple(active), tuple(given.tolist())))
                    return
                shares = tuple(weight / total for weight in active)
                self.phases.append(Phase(unit, shares, tuple(given.tolist())))
                ends = self._first_exhausted(len(self.phases) - 1)
                if ends is None or (stop is not None and unit + ends >= stop):
                    break
                unit += ends
                given = self.given(unit)
            if stop is not None:
                given = self.given(stop)

    def _first_exhausted(self, number: int) -> int | None:
        """Return after how many units of a phase the first source has given all that it may."""
        phase = self.phases[number]
        first: tuple[float, int] | None = None
        for source, most in enumerate(self._most_units):
            if most is not None and phase.shares[source] > 0:
                last = np.array([most - phase.given[source] - 1], np.int64)
                time = float(self._times(number, source, last)[0])
                first = (time, source) if first is None else min(first, (time, source))
        if first is None:
            return None
        time, source = first
        before = int(self._counts(number, time).sum())
        # Units at exactly this time come in the order of their sources.
        while True:
            unit = self._units_in_phase(number, before, 1)
            before += 1
            if unit.sources[0] == source:
                return before

    def _phase_number(self, unit: int) -> int:
        assert unit >= 0
        return sum(phase.first_unit <= unit for phase in self.phases) - 1

    def _units_in_phase(self, number: int, first: int, count: int) -> Units:
        """Return units of a phase, counted from its begin."""
        phase = self.phases[number]
        # Up to any time each source has given at most one unit more or less than its share of it,
        # so these two times enclose the units in question.
        num_sources = len(phase.shares)
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
        given = np.array(phase.given, np.int64)
        return Units(sources[chosen], numbers[chosen] + given[sources[chosen]])

    def _counts(self, number: int, time: float) -> IndexArray:
        """Return `[S]` how many units of each source in a phase lie before a time."""
        counts = np.zeros(len(self.phases[number].shares), np.int64)
        for source, share in enumerate(self.phases[number].shares):
            if share == 0:
                continue
            # One of these three is the first that does not; rounding decides which, here as there.
            near = max(0, math.floor(share * time) - 1)
            candidates = np.arange(near, near + 3)
            before = self._times(number, source, candidates) < time
            counts[source] = near + int(before.sum())
        return counts

    def _times(self, number: int, source: int, numbers: IndexArray) -> npt.NDArray[np.float64]:
        share = self.phases[number].shares[source]
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
    # 32 bits, so that k + u is exact up to 2 million units; beyond, u is rounded, on all machines
    # alike.
    return (bits >> np.uint64(32)).astype(np.float64) * 2.0**-32
