"""What runs in each run holds every pair of values, and `--exhaustive` the rest."""

import itertools
import math

import pytest
from all_pairs import all_pairs


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 3), (4, 1, 2), (2, 2, 2), (6, 5, 2, 3)])
def test_any_two_values_meet(sizes):
    dimensions = [[f"{d}{place}" for place in range(size)] for d, size in enumerate(sizes)]
    chosen = all_pairs(*dimensions)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(itertools.product(*dimensions))
    assert {value for one in chosen for value in one} == {v for one in dimensions for v in one}
    for some, others in itertools.combinations(range(len(sizes)), 2):
        pairs = {(one[some], one[others]) for one in chosen}
        assert pairs == set(itertools.product(dimensions[some], dimensions[others]))
    # No more than twice as many as must be.
    assert len(chosen) <= 1.5 * math.prod(sorted(sizes)[-2:])


def test_a_dimension_alone_is_whole():
    assert all_pairs("abc") == [("a",), ("b",), ("c",)]
