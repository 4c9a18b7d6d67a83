"""AdamW with decay groups."""

from collections.abc import Iterable

import torch
from torch import nn

from largebatch.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight, in the weight's shape, beside the number of its steps."""


def make_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) over the trained parameters of modules.

    Matrices and embeddings decay; biases, norms and scalars such as the temperature don't.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of an optimizer a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
