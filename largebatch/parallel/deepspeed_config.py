"""DeepSpeed's config: what largebatch decides of it, and what it must not make of the optimizer."""

from collections.abc import Mapping
from typing import Any

import torch

from largebatch.config import StrategyConfig
from largebatch.errors import UserError


def engine_config(config: StrategyConfig) -> dict[str, Any]:
    """Return DeepSpeed's config: what largebatch decides, overlaid by `strategy.config`."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {"stage": config.zero_stage},
    }
    return _overlaid(ours, config.config)


def check_wrapper(optimizer: Any, stage: int) -> None:
    """Check that the optimizer which DeepSpeed has made can add up the gradients of several chunks.

    Raises:
        UserError: It can't.
    """
    fits = (
        isinstance(optimizer, torch.optim.Optimizer)
        if stage == 0
        else hasattr(optimizer, "_coalesce_grad_reduction")
    )
    if not fits:
        raise UserError(
            f"strategy.zero_stage={stage} with the precision in strategy.config makes DeepSpeed "
            f"use {type(optimizer).__name__}, which can't add up the gradients of several "
            "chunks; use strategy.zero_stage=2 or 3, or hardware.precision=bf16 without "
            "strategy.config.bf16"
        )


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = _overlaid(below, value)
        else:
            result[key] = value
    return result
