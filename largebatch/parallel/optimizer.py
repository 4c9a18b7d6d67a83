"""AdamW with groups by decay and by layer."""

from collections.abc import Iterable

import torch
from torch import nn

from largebatch.config import OptimConfig
from largebatch.errors import UserError
from largebatch.model.compiled import layers_of
from largebatch.model.encoder import Encoder
from largebatch.model.freeze import in_layers, is_embedding

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight, in the weight's shape, beside the number of its steps."""
RATE_SCALE = "rate_scale"
"""Entry of a group: what the run's learning rate is multiplied by for its weights."""


def make_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) over the trained parameters of modules.

    Matrices and embeddings decay; biases, norms and scalars such as the temperature don't. Where
    rates differ by layer, each rate has groups of its own.

    Raises:
        UserError: Rates are to differ by layer, and the backbone has no list of layers.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for module in modules:
        scales = rate_scales(module, config.layer_decay)
        for parameter in module.parameters():
            if parameter.requires_grad:
                key = (scales.get(id(parameter), 1.0), parameter.ndim < 2)
                groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[scale, is_vector],
                "weight_decay": 0.0 if is_vector else config.weight_decay,
                "lr": config.lr * scale,
                RATE_SCALE: scale,
            }
            for scale, is_vector in sorted(groups)
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def rate_scales(module: nn.Module, layer_decay: float) -> dict[int, float]:
    """Return what the learning rate of an encoder's weights is multiplied by, by their ids.

    Of L layers the l-th, from 1, has `layer_decay ** (L + 1 - l)`; the embeddings before it have
    `layer_decay ** (L + 1)`; all others, the modules that are no encoder above all, are not
    among them and have 1. (BEiT, arXiv 2106.08254, counts in this way.)

    Raises:
        UserError: The backbone has no list of layers.
    """
    if layer_decay == 1 or not isinstance(module, Encoder):
        return {}
    num_layers = len(layers_of(module.backbone))
    if num_layers == 0:
        kind = type(module.backbone).__name__
        raise UserError(
            f"optim.layer_decay={layer_decay}: {kind} has no list of layers; use "
            "optim.layer_decay=1"
        )
    layers = in_layers(module.backbone)
    scales = {weight: layer_decay ** (num_layers - number) for weight, number in layers.items()}
    for name, weight in module.backbone.named_parameters():
        if id(weight) not in layers and is_embedding(name):
            scales[id(weight)] = layer_decay ** (num_layers + 1)
    return scales


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of an optimizer its learning rate, by the run's."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_SCALE, 1.0)
