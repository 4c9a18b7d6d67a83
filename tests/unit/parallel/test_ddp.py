"""Replicas: equal at the start, gradients averaged once a step, clipped by the norm of all."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    QUERIES,
    rank_batch,
    tiny_encoder,
    tiny_loss,
)

from largebatch.config import OptimConfig
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel import collectives as collectives_module
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel, average_gradients, start_equal
from largebatch.step.gradcache import GradCache
from largebatch.world import part_of_rank


def one_step(budget, symmetric):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=symmetric)
    strategy = ReplicatedModel(
        {"encoder": encoder, "objective": loss}, OptimConfig(), Collectives()
    )
    step = GradCache(encoder, loss, tokens_per_chunk=budget, strategy=strategy, balance=False)
    rows = part_of_rank(13, dist.get_rank(), dist.get_world_size())
    report = step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    return report.work.num_chunks, strategy.num_parameters


def count_collectives(budget, symmetric):
    """Return how often each collective was called in one step, and with how many numbers."""
    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append((name, max(arg.numel() for arg in args if isinstance(arg, torch.Tensor))))
            return function(*args, **kwargs)

        return call

    collectives_module._all_gather = counted("gather", collectives_module._all_gather)
    collectives_module._reduce_scatter = counted("scatter", collectives_module._reduce_scatter)
    dist.all_reduce = counted("reduce", dist.all_reduce)
    num_chunks, num_weights = one_step(budget, symmetric)
    return calls, num_chunks, num_weights


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_reduction_a_step_whatever_the_number_of_chunks(symmetric):
    tiny_encoder()  # imports here, once, what each rank would import after its fork
    found = {}
    for budget in (1, 10**6):
        for calls, num_chunks, num_weights in run_ranks(count_collectives, 2, budget, symmetric):
            assert (num_chunks > 10) == (budget == 1)
            kinds = [name for name, _ in calls]
            assert kinds.count("scatter") == 1
            assert kinds.count("gather") <= 4  # numbers of rows, the rows, what masks go by
            assert [size for name, size in calls if name == "reduce"].count(num_weights) == 1
            assert all(size <= 2 * 13 for name, size in calls[:-2] if name == "reduce")
            assert calls[-1] == ("reduce", num_weights)  # after the last chunk
            # Loss and accuracy, the weights, whether memory ran out; symmetric: the maxima, too.
            assert kinds.count("reduce") == (4 if symmetric else 3)
            found[budget] = calls
    assert found[1] == found[10**6]


def made_equal():
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[1].running_mean += dist.get_rank()
    start_equal([model], Collectives())
    return model.state_dict()


def test_start_equal_gives_rank_0s_weights_and_buffers():
    first, second = run_ranks(made_equal, 2)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    assert first["1.running_mean"].tolist() == [0, 0]


def averaged():
    rank = dist.get_rank()
    parameters = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros((), dtype=torch.float64)),
        torch.nn.Parameter(torch.zeros(4)),
    ]
    parameters[0].grad = torch.full((2, 3), float(rank))
    parameters[1].grad = torch.tensor(10.0 * rank, dtype=torch.float64)
    if rank == 1:  # the other rank had no chunk
        parameters[2].grad = torch.full((4,), 6.0)
    average_gradients(parameters, dist.get_world_size())
    return [p.grad for p in parameters], [str(p.grad.dtype) for p in parameters]


def test_averages_all_types_and_counts_a_missing_gradient_as_zeros():
    for gradients, dtypes in run_ranks(averaged, 3):
        np.testing.assert_array_equal(gradients[0], np.ones((2, 3)))
        assert gradients[1] == 10
        np.testing.assert_array_equal(gradients[2], np.full(4, 2.0))
        assert dtypes == ["torch.float32", "torch.float64", "torch.float32"]


@pytest.mark.parametrize("max_norm", [0, 1, 100])
def test_clips_by_the_norm_over_encoder_and_temperature(max_norm):
    model, loss = torch.nn.Linear(2, 1, bias=False), tiny_loss(symmetric=False)
    strategy = ReplicatedModel({"encoder": model, "objective": loss}, OptimConfig(), Collectives())
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    loss.temperature.log_scale.grad = torch.tensor(12.0, dtype=torch.float64)
    assert float(strategy.clip_gradients(max_norm)) == pytest.approx(13)
    left = math.hypot(*model.weight.grad.flatten().tolist(), float(loss.temperature.log_scale.grad))
    assert left == pytest.approx(1 if max_norm == 1 else 13, rel=1e-5)


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    strategy = ReplicatedModel(
        {"encoder": model, "objective": ContrastiveLoss()}, OptimConfig(), Collectives()
    )
    assert strategy.num_parameters == 4
    with strategy.gradient_pass() as backward:
        backward([model(torch.ones(1, 2))], [torch.ones(1, 2)], last=True)
    before = model.bias.clone()
    strategy.step(0.1)
    assert torch.equal(model.bias, before)
    assert model.bias.grad is None


def test_what_no_backward_pass_reached_counts_as_zeros_on_one_rank_too():
    model = torch.nn.Linear(2, 2)
    strategy = ReplicatedModel(
        {"encoder": model, "objective": ContrastiveLoss()}, OptimConfig(), Collectives()
    )
    with strategy.gradient_pass():
        model.weight.grad = torch.ones(2, 2)
    assert model.weight.grad.tolist() == [[1, 1], [1, 1]]
    assert model.bias.grad.tolist() == [0, 0]


def test_the_rate_of_a_step_holds_for_weights_and_temperature():
    model, loss = torch.nn.Linear(2, 1), tiny_loss(symmetric=False)
    strategy = ReplicatedModel(
        {"encoder": model, "objective": loss}, OptimConfig(weight_decay=0.0), Collectives()
    )
    before = [p.detach().clone() for p in strategy.parameters]
    for parameter in strategy.parameters:
        parameter.grad = torch.ones_like(parameter)
    strategy.step(0.25)
    for parameter, old in zip(strategy.parameters, before, strict=True):
        # Adam's first step is the rate times the gradient's sign.
        torch.testing.assert_close(parameter.detach(), old - 0.25, rtol=1e-4, atol=1e-4)
    strategy.zero_grad()
    assert all(p.grad is None for p in strategy.parameters)
