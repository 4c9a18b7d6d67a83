"""The rate of dense matrix products on this device, on a model's own shapes."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from largebatch.transfer import wait_for

SECONDS = 0.02
"""A timing runs as many products as take about so long."""


class MatmulShape(NamedTuple):
    """A product `[tokens, inputs] x [inputs, outputs]`."""

    inputs: int
    outputs: int


def linear_shapes(model: nn.Module) -> Counter[MatmulShape]:
    """Return the shapes of a model's linear layers, and how many layers have each."""
    return Counter(
        MatmulShape(module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def measure_matmul(
    shapes: Mapping[MatmulShape, int],
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 5,
) -> float:
    """Return FLOP/s of the products of all linear layers, each at the best of several timings.

    Args:
        shapes: How many products there are of each shape.
        tokens: Rows of each product's left side.
        dtype: Of both sides.
        device: Where to measure; on a GPU its queue is kept full.
        repeats: Timings of each shape.
    """
    assert shapes, "a model without linear layers"
    flops = seconds = 0.0
    for shape, number in shapes.items():
        flops += number * 2.0 * tokens * shape.inputs * shape.outputs
        seconds += number * _best_seconds(shape, tokens, dtype, device, repeats)
    return flops / seconds


def _best_seconds(
    shape: MatmulShape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    left = torch.randn(tokens, shape.inputs, device=device).to(dtype)
    # As nn.Linear keeps its weight.
    right = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype).T
    out = torch.empty(tokens, shape.outputs, dtype=dtype, device=device)

    def time_of(times: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=out)
        wait_for(device)
        return (time.perf_counter() - start) / times

    time_of(1)  # the first one chooses a kernel
    times = max(1, round(SECONDS / max(time_of(1), 1e-7)))
    return min(time_of(times) for _ in range(repeats))
