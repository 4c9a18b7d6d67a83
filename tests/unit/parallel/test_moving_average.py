"""The moving average of the weights, step by step."""

import numpy as np
import pytest
import torch
from numerics.reference import DOCUMENTS, embed, tiny_encoder, tiny_loss

from largebatch.config import OptimConfig
from largebatch.parallel.average import WeightAverage
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel

DECAY = 0.8


def made():
    encoder = tiny_encoder(dtype=torch.float32)
    strategy = ReplicatedModel(
        {"encoder": encoder, "objective": tiny_loss(symmetric=False, dtype=torch.float32)},
        OptimConfig(),
        Collectives(),
    )
    return encoder, strategy, WeightAverage(strategy, DECAY)


def trained(encoder):
    return {
        f"encoder.{n}": p.detach().clone() for n, p in encoder.named_parameters() if p.requires_grad
    }


def steps(encoder, average):
    """Move the weights at random, and return the average by its formula."""
    torch.manual_seed(1)
    expected = {name: weight.double() for name, weight in trained(encoder).items()}
    for _ in range(4):
        with torch.no_grad():
            for weight in encoder.parameters():
                weight += torch.randn_like(weight)
        average.update()
        for name, weight in trained(encoder).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.double()
    return expected


def assert_is(average, expected):
    found = average.tensors()
    assert found.keys() == expected.keys()  # neither the frozen pooler's nor the temperature
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_is_the_formula():
    encoder, _, average = made()
    assert_is(average, {name: weight.double() for name, weight in trained(encoder).items()})
    assert_is(average, steps(encoder, average))


def test_the_shares_the_wrong_way_round_are_seen():
    encoder, _, average = made()
    average.decay = 1 - DECAY
    with pytest.raises(AssertionError):
        assert_is(average, steps(encoder, average))


def test_the_trained_weights_come_back_in_every_bit():
    encoder, _, average = made()
    steps(encoder, average)
    before = trained(encoder)
    raw = embed(encoder, DOCUMENTS).detach().numpy()
    with average.whole() as whole:
        averaged = embed(whole, DOCUMENTS).detach().numpy()
    assert not np.allclose(averaged, raw, atol=1e-2)
    with pytest.raises(RuntimeError, match="scoring fails"), average.whole():
        raise RuntimeError("scoring fails")
    after = trained(encoder)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_it_is_restored():
    encoder, _, average = made()
    steps(encoder, average)
    saved = average.tensors()
    _, _, other = made()
    other.set_tensors(saved)
    restored = other.tensors()
    assert all(torch.equal(restored[name], weight) for name, weight in saved.items())
    assert {name: weight.shape for name, weight in saved.items()} == other.shapes()
