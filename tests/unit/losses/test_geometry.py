"""Alignment, uniformity and effective rank against their formulas, written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from largebatch.losses.geometry import alignment, effective_rank, uniformity


def rows(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(row):
    return row / math.sqrt(float((row**2).sum()))


def test_alignment_and_uniformity_are_the_papers():
    queries, documents = rows(7, 5), rows(7, 5, seed=1)
    apart = [
        float(((unit(q) - unit(d)) ** 2).sum()) for q, d in zip(queries, documents, strict=True)
    ]
    assert float(alignment(queries, documents)) == pytest.approx(sum(apart) / 7)
    pairs = [
        math.exp(-2 * float(((unit(x) - unit(y)) ** 2).sum()))
        for x, y in itertools.combinations(queries, 2)
    ]
    assert float(uniformity(queries)) == pytest.approx(math.log(sum(pairs) / len(pairs)))


@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 9), (6, 6), (1, 3)])
def test_the_effective_rank_is_that_of_the_singular_values(n, d):
    matrix = rows(n, d)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    shares = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(effective_rank(matrix)) == pytest.approx(expected, rel=1e-9)


def test_the_ends_of_the_scales():
    alike = rows(1, 8).expand(20, 8)
    assert float(uniformity(alike)) == pytest.approx(0)
    assert float(effective_rank(alike)) == pytest.approx(1)
    assert float(alignment(alike, alike)) == 0
    assert float(alignment(alike, -alike)) == pytest.approx(4)
    assert float(effective_rank(torch.eye(8).repeat(3, 1))) == pytest.approx(8)
    # Three directions of 64, in float32: rounding does not look like the others.
    flat = (rows(200, 3) @ rows(3, 64, seed=2)).float()
    assert 1 < float(effective_rank(flat)) < 3.01
    assert float(effective_rank(torch.zeros(4, 3))) == 1
    assert float(uniformity(rows(400, 64))) == pytest.approx(-4, abs=0.2)
