"""Which combinations of a test's dimensions run: all pairs of values, or, when asked for, all.

A fault nearly always hangs on one value or on two that meet, so a set of combinations in which
each pair of values meets finds it, in a fraction of the time. `make test-exhaustive` runs the whole
product; do so when the step, the passes or the strategies change.
"""

import itertools
from collections.abc import Callable, Collection, Hashable
from typing import Any

import pytest

Combination = tuple[Hashable, ...]


def all_pairs(*dimensions: Collection[Hashable]) -> list[Combination]:
    """Return combinations, one value of each dimension, so that any two values meet in one.

    Greedy: the next one is that with the most pairs that no earlier one has, the first of those.
    """
    product = list(itertools.product(*dimensions))
    missing = {pair for one in product for pair in _pairs(one)}
    chosen = []
    while missing:
        best = max(product, key=lambda one: len(missing & _pairs(one)))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=product.index)


def _pairs(combination: Combination) -> set[Any]:
    return set(itertools.combinations(enumerate(combination), min(2, len(combination))))


def combined(**dimensions: Collection[Any]) -> Callable[..., Any]:
    """Parametrize a test over all pairs of values; the other combinations are `exhaustive` tests.

    The ids are those of one `parametrize` over the other.
    """
    kept = set(all_pairs(*map(range, map(len, dimensions.values()))))
    places = itertools.product(*map(range, map(len, dimensions.values())))
    return pytest.mark.parametrize(
        list(dimensions),
        [
            pytest.param(
                *combination,
                id="-".join(map(str, combination)),
                marks=() if place in kept else pytest.mark.exhaustive,
            )
            for place, combination in zip(
                places, itertools.product(*dimensions.values()), strict=True
            )
        ],
    )


def by_first(first: Collection[Any], *others: Collection[Any]) -> list[Any]:
    """Return the same as parameters, but each value of the first with a list of what it meets.

    For tests that start something costly for each value of the first, and run the list in it.
    """
    kept = all_pairs(first, *others)
    rest = [one for one in itertools.product(first, *others) if one not in set(kept)]
    parameters = []
    for name, some, marks in (("", kept, ()), ("-others", rest, pytest.mark.exhaustive)):
        met = {value: [one[1:] for one in some if one[0] == value] for value in first}
        parameters += [
            pytest.param(value, those, id=f"{value}{name}", marks=marks)
            for value, those in met.items()
            if those
        ]
    return parameters
