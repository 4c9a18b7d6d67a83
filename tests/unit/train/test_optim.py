"""AdamW's groups and the learning rate of every step."""

from itertools import pairwise

import pytest
import torch

from largebatch.config import SCHEDULES, OptimConfig, ScheduleConfig
from largebatch.losses.temperature import Temperature
from largebatch.train.optim import learning_rate, make_optimizer, set_learning_rate


def rates(max_steps=20, highest=2.0, **options):
    config = ScheduleConfig(**options)
    return [
        learning_rate(step, config, highest=highest, max_steps=max_steps)
        for step in range(max_steps)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_to_the_highest_and_no_step_is_at_zero(name):
    found = rates(name=name, warmup_steps=4)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(found) == 2.0
    assert min(found) > 0
    falling = found[3:]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_what_comes_after_the_last_step_is_the_final_fraction(name, warmup_steps):
    config = ScheduleConfig(name=name, warmup_steps=warmup_steps, final_fraction=0.1)
    after = learning_rate(20, config, highest=2.0, max_steps=20)
    assert after == pytest.approx(2.0 if name == "constant" else 0.2)


def test_shapes():
    assert rates(name="constant", warmup_steps=0) == [2.0] * 20
    linear = rates(name="linear", warmup_steps=1)
    steps = [before - after for before, after in pairwise(linear)]
    assert steps == pytest.approx([0.1] * 19)
    cosine = rates(name="cosine", warmup_steps=1)
    assert cosine[10] == pytest.approx(1.0)  # half-way down
    assert cosine[1] > linear[1]
    assert cosine[-1] < linear[-1]


def test_wsd_stays_and_then_falls_along_a_line():
    found = rates(name="wsd", warmup_steps=2, decay_fraction=0.25)
    assert found[1:15] == [2.0] * 14
    assert found[15:] == pytest.approx([2 * left / 6 for left in (5, 4, 3, 2, 1)])
    assert rates(name="wsd", warmup_steps=0, decay_fraction=0.0) == [2.0] * 20


def test_a_warmup_longer_than_the_run():
    assert rates(max_steps=3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])
    assert rates(max_steps=3, warmup_steps=3)[-1] == 2.0


def test_only_matrices_decay_and_only_what_is_trained():
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)
    )
    model[1].weight.requires_grad_(False)
    temperature = Temperature(0.1, learned=True)
    optimizer = make_optimizer(
        [model, temperature], OptimConfig(lr=3e-4, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-7)
    )
    decayed, others = optimizer.param_groups
    assert decayed["params"] == [model[0].weight]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (model[1].bias, *model[2].parameters(), temperature.log_scale)
    }
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-7)


def test_sets_the_rate_of_every_group():
    optimizer = make_optimizer([torch.nn.Linear(2, 2)], OptimConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer([model], OptimConfig(weight_decay=0.0))
    set_learning_rate(optimizer, 0.5)
    before = model.bias.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    # Adam's first step is the rate times the gradient's sign.
    torch.testing.assert_close(model.bias.detach(), before - 0.5, rtol=1e-4, atol=1e-4)
