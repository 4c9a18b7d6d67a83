"""The sigmoid loss over a global batch (SigLIP, arXiv 2303.15343), in tiles.

Shapes: b queries of this rank, m documents of all ranks (columns), d embedding width.

The slow version, which the tests compare with, value and every gradient (the paper's algorithm 1,
with a sum over columns in place of a square matrix):

    logits_bm = scale * queries_bd @ documents_md.T + bias
    signs_bm = -1, and 1 at [range(b), positives_b]
    losses_bm = softplus(-signs_bm * logits_bm)
    losses_bm[false_negatives_bm] = 0  # see masks.py; no query's own document is one
    loss = losses_bm.sum()

Every pair is a question of its own, answered by yes or no, so a tile needs nothing of the others.
Logits, sums and gradients are float32 (float64 for such inputs) whatever the inputs are.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from largebatch.losses.masks import FalseNegatives
from largebatch.losses.tiles import TILE, own_in_tile, slices


class SigmoidSums(NamedTuple):
    """What `sigmoid_loss` returns."""

    loss: Tensor
    """Scalar, the sum over this rank's rows."""
    positive_loss: Tensor
    """Scalar, what the rows' own documents add to it. Has no gradient."""
    num_correct: Tensor
    """Scalar, how many rows have no column that scores above their own document; false negatives
    don't count. Has no gradient."""
    num_masked: Tensor
    """Scalar, how many negatives are left out as false ones. Has no gradient."""


def sigmoid_loss(
    queries_bd: Tensor,
    documents_md: Tensor,
    positives_b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    false_negatives: FalseNegatives | None = None,
    tile: int = TILE,
) -> SigmoidSums:
    """Sum the sigmoid loss over this rank's rows (arXiv 2303.15343), not yet divided by them.

    Args:
        queries_bd: This rank's queries.
        documents_md: The documents of all ranks, negatives included.
        positives_b: int64, the column of each query's document.
        scale: Scalar t, which cosines are multiplied with.
        bias: Scalar b, which is added to that.
        false_negatives: Columns that add nothing to a row; it must have been made for these rows
            and columns. None: every column but its own is a negative.
        tile: Rows and columns that are looked at together.

    Beyond its inputs and their gradients this holds a few tiles and a few numbers per row.
    """
    sums = _TiledSigmoid.apply(  # type: ignore[no-untyped-call]
        queries_bd, documents_md, scale, bias, positives_b, false_negatives, tile
    )
    return SigmoidSums(*sums)


class _TiledSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_bd: Tensor,
        documents_md: Tensor,
        scale: Tensor,
        bias: Tensor,
        positives_b: Tensor,
        false_negatives: FalseNegatives | None,
        tile: int,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(queries_bd.dtype, torch.float32)
        loss, masked = (queries_bd.new_zeros((), dtype=dtype) for _ in range(2))
        positive_b = queries_bd.new_zeros(len(queries_bd), dtype=dtype)
        best_other_b = torch.full_like(positive_b, -torch.inf)
        for rows in slices(slice(0, len(queries_bd)), tile):
            scaled = scale.to(dtype) * queries_bd[rows].to(dtype)
            for columns in slices(slice(0, len(documents_md)), tile):
                logits = torch.addmm(bias.to(dtype), scaled, documents_md[columns].to(dtype).T)
                index, inside = own_in_tile(positives_b[rows], columns)
                own = logits.gather(1, index).squeeze(1)
                positive_b[rows] = torch.where(inside, own, positive_b[rows])
                # softplus(-inf) is 0: neither the row's own document nor a false negative adds to
                # the negatives.
                logits.scatter_(1, index, torch.where(inside, -torch.inf, own)[:, None])
                if false_negatives is not None:
                    mask = false_negatives.fill_(logits, rows, columns, -torch.inf)
                    if mask is not None:
                        masked += mask.sum()
                best_other_b[rows] = torch.maximum(best_other_b[rows], logits.amax(1))
                loss += F.softplus(logits).sum()
        positive_loss = F.softplus(-positive_b).sum()
        num_correct = (positive_b >= best_other_b).sum().to(dtype)
        ctx.save_for_backward(queries_bd, documents_md, scale, bias, positives_b)
        ctx.false_negatives, ctx.tile = false_negatives, tile
        ctx.mark_non_differentiable(positive_loss, num_correct, masked)
        return loss + positive_loss, positive_loss, num_correct, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        queries_bd, documents_md, scale, bias, positives_b = ctx.saved_tensors
        dtype = grad_loss.dtype
        t = scale.to(dtype)
        grad_queries_bd = torch.zeros_like(queries_bd, dtype=dtype)
        grad_documents_md = torch.empty_like(documents_md)
        grad_scale, grad_bias = grad_loss.new_zeros(()), grad_loss.new_zeros(())
        for columns in slices(slice(0, len(documents_md)), ctx.tile):
            documents = documents_md[columns].to(dtype)
            grad_documents = torch.zeros_like(documents)
            for rows in slices(slice(0, len(queries_bd)), ctx.tile):
                queries = queries_bd[rows].to(dtype)
                cosines = queries @ documents.T
                logits = t * cosines + bias.to(dtype)
                # d loss / d logit: the sigmoid, and at the row's own document minus that of its
                # negative.
                index, inside = own_in_tile(positives_b[rows], columns)
                own = logits.gather(1, index).squeeze(1)
                grad_logits = logits.sigmoid_()
                if ctx.false_negatives is not None:
                    ctx.false_negatives.fill_(grad_logits, rows, columns, 0)
                present = grad_logits.gather(1, index).squeeze(1)
                grad_own = torch.where(inside, -torch.sigmoid(-own), present)
                grad_logits.scatter_(1, index, grad_own[:, None])
                grad_bias += grad_logits.sum()
                grad_scale += torch.dot(grad_logits.flatten(), cosines.flatten())
                grad_queries_bd[rows].addmm_(grad_logits, documents)
                grad_documents.addmm_(grad_logits.T, queries)
            grad_documents_md[columns] = grad_documents.mul_(grad_loss * t)
        return (
            grad_queries_bd.mul_(grad_loss * t).to(queries_bd.dtype),
            grad_documents_md,
            (grad_loss * grad_scale).to(scale.dtype),
            (grad_loss * grad_bias).to(bias.dtype),
            *[None] * 3,
        )
