from collections import Counter

import torch
from torch import nn

from largebatch.bench import matmul
from largebatch.bench.matmul import MatmulShape, linear_shapes, measure_matmul

CPU = torch.device("cpu")


def test_shapes_of_linear_layers_are_counted():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 8))
    assert linear_shapes(model) == {MatmulShape(4, 8): 2, MatmulShape(8, 4): 1}


def test_the_rate_is_plausible():
    rate = measure_matmul(
        Counter({MatmulShape(128, 256): 2}), tokens=512, dtype=torch.float32, device=CPU, repeats=3
    )
    assert 1e8 < rate < 1e14


def test_the_rate_is_operations_over_seconds_of_each_shape(monkeypatch):
    seconds = {MatmulShape(10, 20): 0.5, MatmulShape(20, 5): 2.0}
    monkeypatch.setattr(matmul, "_best_seconds", lambda shape, *_: seconds[shape])
    rate = measure_matmul(
        {MatmulShape(10, 20): 3, MatmulShape(20, 5): 1}, tokens=7, dtype=torch.float32, device=CPU
    )
    flops = 3 * 2 * 7 * 10 * 20 + 2 * 7 * 20 * 5
    assert rate == flops / (3 * 0.5 + 2.0)
