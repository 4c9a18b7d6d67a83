"""Strategies for tests on CPU ranks: their configs, tolerances, and gradients, whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from largebatch.config import StrategyConfig
from largebatch.parallel.strategy import Strategy

# DeepSpeed reduces in float32 whatever the weights are.
TOLERANCES = {"ddp": 1e-6, "fsdp": 1e-6} | dict.fromkeys(("zero0", "zero1", "zero2", "zero3"), 1e-4)


def config_of(name: str) -> StrategyConfig:
    """Return the config of `ddp`, `fsdp` or `zeroN`."""
    if not name.startswith("zero"):
        return StrategyConfig(name=name)
    return StrategyConfig(
        name="deepspeed",
        zero_stage=int(name[-1]),
        # Tiny weights lie below the default, and would never be sharded.
        config={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )


def whole_gradients(strategy: Strategy) -> dict[str, Tensor]:
    """Return the gradients by name, whole, on every rank."""
    found = {}
    for module in strategy.modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found[name] = _whole_gradient(parameter).clone()
    return found


def _whole_gradient(parameter):
    if isinstance(parameter.grad, DTensor):
        return parameter.grad.full_tensor()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad
