"""AdamW's groups and its learning rate."""

import pytest
import torch
from numerics.reference import tiny_encoder

from largebatch.config import OptimConfig
from largebatch.errors import UserError
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


def test_each_layer_has_a_rate_of_its_own():
    encoder = tiny_encoder()
    optimizer = make_optimizer([encoder], OptimConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 8.0)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        layer = next((n for n in (0, 1) if f"layer.{n}." in name), -1)
        group = found[id(parameter)]
        assert group["lr"] == {-1: 1.0, 0: 2.0, 1: 4.0}[layer], name
        assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert len(optimizer.param_groups) == 6


def test_a_backbone_without_layers_has_no_rates_by_layer():
    encoder = tiny_encoder()
    encoder.backbone.encoder = torch.nn.Linear(2, 2)
    with pytest.raises(
        UserError, match=r"optim\.layer_decay=0\.5: BertModel has no list of layers"
    ):
        make_optimizer([encoder], OptimConfig(layer_decay=0.5))


def test_the_fused_kernel_is_the_plain_one_but_for_rounding():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 30)
        optimizer = make_optimizer([model], OptimConfig(lr=1e-2, weight_decay=0.1))
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
            group["foreach"] = False
        for step in range(20):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(8, 40)).square().sum().backward()
            optimizer.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
