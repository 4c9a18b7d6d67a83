"""Makes the strategy that a config names."""

import importlib
from collections.abc import Mapping

import torch
from torch import nn

from largebatch.config import STRATEGIES, OptimConfig, StrategyConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.strategy import ENCODER, Strategy


def make_strategy(
    config: StrategyConfig,
    modules: Mapping[str, nn.Module],
    optim: OptimConfig,
    collectives: Collectives,
    device: torch.device,
    precision: str,
) -> Strategy:
    """Spread a model over the ranks, all with rank 0's weights; called by all ranks.

    Args:
        config: Which strategy, and its options.
        modules: The whole encoder and what is trained beside it, by name, on `device`. From here on
            they belong to the strategy.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
        device: Of this rank.
        precision: float32 or bf16 (autocast in the encoder).

    Raises:
        UserError: The strategy can't run here, or its options don't fit together.
    """
    if device.type == "cuda" and config.name != "ddp":
        torch.cuda.set_device(device)  # where fully_shard and DeepSpeed put the shards
    if precision == "bf16":
        modules[ENCODER].autocast_dtype = torch.bfloat16  # type: ignore[assignment]
    module, _, name = STRATEGIES[config.name].partition(":")
    strategy = getattr(importlib.import_module(f"largebatch.parallel.{module}"), name)
    made: Strategy = strategy(modules, optim, collectives, device, config)
    return made
