"""LoRA (arXiv 2106.09685), by peft: small matrices beside the backbone's, which alone are trained.

A product `x W` becomes `x W + alpha / r * dropout(x) A B`, where A and B have rank r. B begins at
0, so the first step sees the backbone as it came. The backbone stays the transformers model that
it is, with other modules where its linear ones were; on export A B goes into W.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.config import LoraConfig, suggest
from largebatch.errors import UserError
from largebatch.model.compiled import layers_of

ADAPTER = "default"
ALL_LINEAR = "all-linear"


def add_adapters(backbone: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside a backbone's linear modules, in place; all else of it is frozen.

    Matrices A are drawn from torch's generator.

    Raises:
        UserError: peft is not installed, or the backbone lacks a target.
    """
    targets = targets_of(backbone, config.targets)
    import peft

    model: Any = backbone
    is_linear = [isinstance(model.get_submodule(name), nn.Linear) for name in targets]
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a number is all that it needs
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=not any(is_linear),  # as GPT-2's Conv1D has its weights
            bias="none",
        ),
        model,
        adapter_name=ADAPTER,
    )
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(".lora_" in name)


def has_adapters(module: nn.Module) -> bool:
    """Return whether any module in a module has an adapter."""
    return any(_is_adapted(one) for one in module.modules())


def targets_of(backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the modules that get adapters.

    Args:
        backbone: A transformers model, without adapters.
        targets: all-linear (every linear module of the layers), or the last parts of their names.

    Raises:
        UserError: peft is not installed, or a target is no linear module of the backbone.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora.r needs peft: pip install 'largebatch[lora]'")
    from transformers.pytorch_utils import Conv1D

    # Conv1D is what GPT-2 calls its linear module.
    linear = [
        name for name, one in backbone.named_modules() if isinstance(one, (nn.Linear, Conv1D))
    ]
    in_layers = {id(one) for layer in layers_of(backbone) for one in layer.modules()}
    of_layers = [name for name in linear if id(backbone.get_submodule(name)) in in_layers]
    found: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            own = of_layers
        else:
            own = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not own:
            there = sorted({name.rpartition(".")[2] for name in of_layers})
            near = suggest(target.rpartition(".")[2], there)
            raise UserError(
                f"lora.targets: {target!r} is no linear module of {type(backbone).__name__}{near}; "
                f"there are {', '.join([ALL_LINEAR, *there])}"
            )
        found += own
    return list(dict.fromkeys(found))


@torch.no_grad()
def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a backbone with adapters as those of one without: `W + alpha / r A B`.

    The sum is taken in float64 and rounded once.
    """
    adapted = {name: one for name, one in backbone.named_modules() if _is_adapted(one)}
    merged: dict[str, Tensor] = {}
    for name, tensor in backbone.state_dict().items():
        if ".lora_" in name:
            continue
        before, base, last = name.rpartition(".base_layer.")
        if not base:
            merged[name] = tensor
            continue
        if last == "weight":
            layer: Any = adapted[before]
            product = layer.lora_B[ADAPTER].weight.double() @ layer.lora_A[ADAPTER].weight.double()
            change = (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]
            tensor = (tensor.double() + change).to(tensor.dtype)
        merged[f"{before}.{last}"] = tensor
    return merged


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
