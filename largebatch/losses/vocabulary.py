"""Losses over a vocabulary, without the matrix of logits: it goes tile by tile.

Shapes: T tokens that are predicted, V tokens of the vocabulary, E width of what predicts them, m
texts of at most L tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""Most logits that exist at a time, 64 MiB in float32; at least those of one token, or of one
text."""


class TokenLoss(NamedTuple):
    """Of T tokens."""

    loss: Tensor
    """Scalar, the sum of the cross entropies."""
    num_correct: Tensor
    """Scalar int64, tokens whose highest logit is the right one."""


def token_cross_entropy(
    states_TE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor,
    targets_T: Tensor,
    *,
    dtype: torch.dtype | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenLoss:
    """Return the cross entropy of tokens, summed.

    The same as this, but for memory:

        logits = states_TE @ weight_VE.T + bias_V
        cross_entropy(logits, targets_T, reduction="sum"), (logits.argmax(1) == targets_T).sum()

    Args:
        states_TE: What predicts each token.
        weight_VE: A row for each token of the vocabulary.
        bias_V: A number for each.
        targets_T: int64, the right tokens.
        dtype: What products are computed in, such as bfloat16; all else is float32 at least. None:
            that of the states.
        logits_at_once: See `LOGITS_AT_ONCE`.

    A tile of tokens has all its logits at once; the backward pass computes them again.
    """
    rows = max(logits_at_once // len(weight_VE), 1)
    loss, num_correct = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        states_TE, weight_VE, bias_V, targets_T, dtype or states_TE.dtype, rows
    )
    return TokenLoss(loss, num_correct)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor,
        targets_T: Tensor,
        dtype: torch.dtype,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        columns_EV = weight_VE.to(dtype).T
        norms_T = torch.empty_like(targets_T, dtype=states_TE.dtype)
        loss = states_TE.new_zeros(())
        num_correct = targets_T.new_zeros(())
        for tile in _tiles(len(targets_T), rows):
            logits_tV = _logits(states_TE[tile], columns_EV, bias_V)
            norms_T[tile] = logits_tV.logsumexp(1)
            right_t = logits_tV.gather(1, targets_T[tile, None])[:, 0]
            loss += (norms_T[tile] - right_t).sum()
            num_correct += (logits_tV.argmax(1) == targets_T[tile]).sum()
        ctx.save_for_backward(states_TE, weight_VE, bias_V, targets_T, norms_T)
        ctx.dtype, ctx.rows = dtype, rows
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_loss: Tensor, _of_correct: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        states_TE, weight_VE, bias_V, targets_T, norms_T = ctx.saved_tensors
        rows_VE = weight_VE.to(ctx.dtype)
        of_states_TE = torch.empty_like(states_TE)
        of_weight_VE = torch.zeros_like(weight_VE, dtype=states_TE.dtype)
        of_bias_V = torch.zeros_like(bias_V, dtype=states_TE.dtype)
        for tile in _tiles(len(targets_T), ctx.rows):
            states_tE = states_TE[tile].to(ctx.dtype)
            # softmax minus one-hot
            of_logits_tV = _logits(states_tE, rows_VE.T, bias_V).to(norms_T.dtype)
            of_logits_tV = of_logits_tV.sub_(norms_T[tile, None]).exp_()
            ones_t1 = torch.ones_like(targets_T[tile, None], dtype=of_logits_tV.dtype)
            of_logits_tV.scatter_add_(1, targets_T[tile, None], -ones_t1)
            of_logits_tV *= of_loss
            of_bias_V += of_logits_tV.sum(0)
            low_tV = of_logits_tV.to(ctx.dtype)
            of_states_TE[tile] = low_tV @ rows_VE
            of_weight_VE += low_tV.T @ states_tE
        return (
            of_states_TE,
            of_weight_VE.to(weight_VE.dtype),
            of_bias_V.to(bias_V.dtype),
            None,
            None,
            None,
        )


def bag_of_words(
    states_mLE: Tensor,
    in_text_mL: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor,
    words_mL: Tensor,
    shares_m: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return how badly texts tell their own words, summed over texts (DupMAE, arXiv 2211.08769).

    The logits of a text are the highest over its tokens:

        highest_V = (states_LE @ weight_VE.T + bias_V).max(0)
        loss = -share * sum(log_softmax(highest_V)[word] for word in words)

    Args:
        states_mLE: What predicts, for each token of a few texts.
        in_text_mL: Which of them count.
        weight_VE: As in `token_cross_entropy`.
        bias_V: Likewise.
        words_mL: int64, different words of each text; a negative number is none.
        shares_m: What each of a text's words weighs.
        dtype: As in `token_cross_entropy`.

    The m texts' logits exist at once, `[m, L, V]`; the backward pass computes them again.
    """
    loss: Tensor = checkpoint(
        _bag_of_words,
        states_mLE,
        in_text_mL,
        weight_VE,
        bias_V,
        words_mL,
        shares_m,
        dtype or states_mLE.dtype,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return loss


def _bag_of_words(
    states_mLE: Tensor,
    in_text_mL: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor,
    words_mL: Tensor,
    shares_m: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    logits_mLV = _logits(states_mLE, weight_VE.to(dtype).T, bias_V)
    highest_mV = logits_mLV.masked_fill(~in_text_mL[..., None], -torch.inf).max(1).values
    # A text none of whose tokens count has no words either.
    highest_mV = torch.where(in_text_mL.any(1)[:, None], highest_mV, 0.0)
    surprise_mL = highest_mV.logsumexp(1, keepdim=True) - highest_mV.gather(
        1, words_mL.clamp(min=0)
    )
    return (torch.where(words_mL >= 0, surprise_mL, 0.0) * shares_m[:, None]).sum()


def _logits(states: Tensor, columns_EV: Tensor, bias_V: Tensor) -> Tensor:
    """Return logits in float32, or float64 for float64 weights."""
    logits = states.to(columns_EV.dtype) @ columns_EV
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) + bias_V.to(wide)


def _tiles(number: int, rows: int) -> Iterator[slice]:
    return (slice(first, first + rows) for first in range(0, number, rows))
