"""Pooling: hidden states of a text's tokens become one vector.

Shapes: n texts, L tokens, H hidden width. All functions are right under left and right padding and
under the padding that a text longer than its neighbours never has. A text without any token, as an
empty one where no special tokens are added, becomes zero: padding says nothing of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from largebatch.batch import Chunk


def pool_cls(hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the first token of each text, `[n, H]`."""
    return _token(hidden_nLH, mask_nL, mask_nL.int().argmax(dim=1))


def pool_last(hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the last token of each text, `[n, H]`."""
    last_n = mask_nL.shape[1] - 1 - mask_nL.int().flip(1).argmax(dim=1)
    return _token(hidden_nLH, mask_nL, last_n)


def pool_mean(hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the mean over the tokens of each text, `[n, H]`."""
    return _weighted(hidden_nLH, mask_nL.to(hidden_nLH.dtype))


def pool_weighted_mean(hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the mean in which token i, from 1, weighs i, `[n, H]` (SGPT, arXiv 2202.08904)."""
    return _weighted(hidden_nLH, (mask_nL.cumsum(dim=1) * mask_nL).to(hidden_nLH.dtype))


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": pool_cls,
    "mean": pool_mean,
    "last": pool_last,
    "weighted_mean": pool_weighted_mean,
}


def pool_chunk(pooling: str, hidden: Tensor, chunk: Chunk) -> Tensor:
    """Return the vector of each text of a chunk, `[n, H]`.

    Args:
        pooling: A key of POOLING.
        hidden: `[n, L, H]`, or `[1, T, H]` where the chunk is packed.
        chunk: What it was made of.
    """
    pool = POOLING[pooling]
    if chunk.packing is None:
        return pool(hidden, chunk.attention_mask)
    runs = chunk.packing.runs
    sizes = [run.num_texts * run.length for run in runs]
    parts = zip(runs, hidden[0].split(sizes), chunk.attention_mask[0].split(sizes), strict=True)
    # Texts of one length are a batch without padding.
    return torch.cat([pool(h.unflatten(0, run), mask.unflatten(0, run)) for run, h, mask in parts])


def _token(hidden_nLH: Tensor, mask_nL: Tensor, place_n: Tensor) -> Tensor:
    rows_n = torch.arange(len(hidden_nLH), device=hidden_nLH.device)
    return zero_where_masked(hidden_nLH[rows_n, place_n], mask_nL[rows_n, place_n])


def zero_where_masked(tokens_nH: Tensor, mask_n: Tensor) -> Tensor:
    """Return the tokens that poolings look at, `[n, H]`, zero for texts whose one is padding."""
    return tokens_nH.masked_fill((mask_n == 0).unsqueeze(1), 0)


def _weighted(hidden_nLH: Tensor, weights_nL: Tensor) -> Tensor:
    # As a product of [1, L] and [L, H]: no [n, L, H] copy of the hidden states is made.
    total_nH = torch.bmm(weights_nL.unsqueeze(1), hidden_nLH).squeeze(1)
    # A text without any token has no weights: its embedding is zero, not NaN.
    return total_nH / weights_nL.sum(dim=1, keepdim=True).clamp(min=1)
