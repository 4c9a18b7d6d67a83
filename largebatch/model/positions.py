"""Positions of a backbone: how many there are, where a text begins, and what fits."""

from typing import Any

import torch
from torch import nn

from largebatch.data.text import TextSettings
from largebatch.errors import UserError


def check_fit(backbone: nn.Module, tokenizer: Any, text: TextSettings) -> None:
    """Raise a UserError if the model lacks some of the tokens, or positions for the longest text.

    Args:
        backbone: A transformers model.
        tokenizer: Whose tokens it gets.
        text: The maximum lengths.
    """
    known = getattr(backbone.config, "vocab_size", None)
    if isinstance(known, int) and len(tokenizer) > known:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model knows {known}: "
            "use the model's own tokenizer"
        )
    positions = usable_positions(backbone)
    for name in ("query_max_tokens", "document_max_tokens"):
        if positions is not None and getattr(text, name) > positions:
            raise UserError(
                f"text.{name}={getattr(text, name)} is beyond the {positions} positions "
                "of the model; lower it"
            )


def length_multiple(
    backbone: nn.Module, device: torch.device, autocast_dtype: torch.dtype | None
) -> int:
    """Return what padded lengths are rounded up to: what tensor cores like, without them 1."""
    if device.type == "cuda" and autocast_dtype in (torch.bfloat16, torch.float16):
        positions = usable_positions(backbone)
        return 8 if positions is None or positions % 8 == 0 else 1
    return 1


def usable_positions(backbone: nn.Module) -> int | None:
    """Return the longest text that a model takes, None if it has no limit that it tells."""
    if (embedding := _position_embedding(backbone)) is not None:
        skipped = embedding.padding_idx
        return embedding.num_embeddings - (0 if skipped is None else skipped + 1)
    positions = getattr(backbone.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def skipped_position(backbone: nn.Module) -> int | None:
    """Return the position that RoBERTa's kind gives to padding; None for the others.

    It is also the id of the padding token, and positions of a text are counted from behind it.
    """
    embedding = _position_embedding(backbone)
    return None if embedding is None else embedding.padding_idx


def _position_embedding(backbone: nn.Module) -> nn.Embedding | None:
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module
    return None
