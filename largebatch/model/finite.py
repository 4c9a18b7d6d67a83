"""Numbers that must not leave a model: weights and embeddings that are not finite, or all zeros."""

import reprlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from largebatch.errors import UserError


def damaged_weight(module: nn.Module) -> str | None:
    """Return the name of the first weight with values that are not finite; None: there is none."""
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.numel():
            # Both extremes are NaN where any value is; nothing as large as the weight is made.
            extremes = torch.stack(torch.aminmax(weight.detach()))
            if not extremes.isfinite().all():
                return name
    return None


def check_weights(module: nn.Module, where: str) -> None:
    """Check that all weights are finite.

    Args:
        module: Its weights are looked at, in place.
        where: Where they come from, for the message.

    Raises:
        UserError: One is NaN or infinite.
    """
    name = damaged_weight(module)
    if name is not None:
        raise UserError(
            f"{where}: the weight {name} has values that are not finite; the file is damaged, or "
            "the training diverged: take another model or checkpoint"
        )


def check_embeddings(
    embeddings_nd: npt.NDArray[np.float32],
    texts: Sequence[str],
    lengths: npt.NDArray[np.int32],
    *,
    side: str,
    first: int,
    normalized: bool,
) -> None:
    """Check that embeddings are finite and have a direction.

    Args:
        embeddings_nd: `[n, d]`.
        texts: Their n texts.
        lengths: `[n]`, tokens of each. A text without any may have an embedding of zeros.
        side: query or document, for the message.
        first: Row of the first of them among all that are encoded, for the message.
        normalized: Whether they have unit length.

    Raises:
        UserError: One is not finite, or has no length; the first such row is named.
    """
    # A float64 sum of squares of float32 values is finite exactly if all of them are.
    squares_n = np.einsum("ij,ij->i", embeddings_nd, embeddings_nd, dtype=np.float64)
    shortest = 0.25 if normalized else np.finfo(np.float64).tiny
    damaged_n = ~np.isfinite(squares_n) | ((squares_n < shortest) & (lengths > 0))
    if not damaged_n.any():
        return
    row = int(damaged_n.argmax())
    what = "is all zeros" if np.isfinite(squares_n[row]) else "has values that are not finite"
    raise UserError(
        f"row {first + row}: the embedding of the {side} {reprlib.repr(texts[row])} {what}; the "
        "model's weights are damaged, or its training diverged"
    )
