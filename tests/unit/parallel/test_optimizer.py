"""AdamW's groups and its learning rate."""

import torch

from largebatch.config import OptimConfig
from largebatch.losses.temperature import Temperature
from largebatch.parallel.optimizer import make_optimizer, set_learning_rate


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
