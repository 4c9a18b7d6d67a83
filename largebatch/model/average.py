"""Weights between those of several models of one architecture: their mean, or along an arc."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.model.encoder import Encoder

UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a config that say nothing about what a model computes."""
PARALLEL = 1e-6
"""Sine of the angle below which an arc is a straight line."""


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean, in float64.

    Args:
        tensors: Of one shape.
        weights: As many, which need not add up to 1.
    """
    shares = [weight / sum(weights) for weight in weights]
    return sum(
        (share * one.double() for share, one in zip(shares, tensors, strict=True)),
        torch.zeros_like(tensors[0], dtype=torch.float64),
    )


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return what lies between tensors on the arc from one to the next, in float64.

    Of two, `(sin((1 - t) w) a + sin(t w) b) / sin(w)`, w their angle and t the second's share of
    the weights (Shoemake 1985); lengths go along. Of more, each is reached for from what lies
    between those before it, so their order matters a little.

    Args:
        tensors: Of one shape, each taken as one vector.
        weights: As many, which need not add up to 1; not all of the first ones are 0.
    """
    between, total = tensors[0].double(), weights[0]
    for one, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        between = _arc(between, one.double(), weight / total if total else 0.0)
    return between


METHODS = {"mean": mean, "slerp": slerp}


def why_not_alike(first: Encoder, other: Encoder) -> str | None:
    """Return why two models can't be averaged; None: they can."""
    mine, others = _computed_by(first.backbone.config), _computed_by(other.backbone.config)
    for key in sorted(mine.keys() | others.keys()):
        if mine.get(key) != others.get(key):
            return f"another architecture: {key} is {others.get(key)}, not {mine.get(key)}"
    if _tokens_of(first.tokenizer) != _tokens_of(other.tokenizer):
        return "another tokenizer"
    for what in ("normalize", "lower_case"):
        if getattr(first, what) != getattr(other, what):
            return f"{what}={getattr(other, what)}, not {getattr(first, what)}"
    if first.pooling.name != other.pooling.name:
        return f"another pooling: {other.pooling.name}, not {first.pooling.name}"
    return None


def text_differences(first: Encoder, other: Encoder) -> list[str]:
    """Return the names of prompts and lengths in which two models differ."""
    mine, others = asdict(first.text), asdict(other.text)
    return [name for name, value in mine.items() if others[name] != value]


@torch.no_grad()
def average_into(
    encoder: Encoder,
    states: Sequence[Mapping[str, Tensor]],
    *,
    method: str,
    weights: Sequence[float],
) -> None:
    """Give an encoder what lies between the weights of models like it.

    Args:
        encoder: Gets them; it has no adapters.
        states: Their `state_dict`s.
        method: mean or slerp.
        weights: As many.

    Raises:
        UserError: One of them has other weights.
    """
    own = encoder.state_dict()
    for number, state in enumerate(states, start=1):
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise UserError(f"model {number} has weights of other names or shapes than the first")
    for name, tensor in own.items():
        if tensor.is_floating_point():
            tensor.copy_(METHODS[method]([state[name] for state in states], weights))


def _arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    lengths = a.norm() * b.norm()
    cosine = float((a.flatten() @ b.flatten()) / lengths) if lengths > 0 else 1.0
    angle = torch.acos(torch.tensor(min(max(cosine, -1.0), 1.0), dtype=torch.float64))
    if torch.sin(angle) < PARALLEL:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def _computed_by(config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in UNIMPORTANT and "dropout" not in key and key != "use_cache"
    }


def _tokens_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    parts = json.loads(backend.to_str())
    return {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
