"""InfoNCE over a global batch, in tiles: no matrix of all queries by all documents ever exists.

Shapes: b queries of this rank, m documents of all ranks (columns), d embedding width.

The slow version, which the tests compare with, value and every gradient:

    logits_bm = scale * queries_bd @ documents_md.T
    loss = (logsumexp(logits_bm, 1) - logits_bm[range(b), positives_b]).sum()
    # symmetric: each positive document must also find its query among all queries of all ranks,
    # so its log-sum-exp runs over the rows of every rank
    columns_m = combine_columns(logsumexp(logits_bm, 0))
    loss = (loss + (columns_m[positives_b] - logits_bm[range(b), positives_b]).sum()) / 2

The fast one keeps the positive apart from the others, as in softplus(logsumexp(others) - positive):
where the positive takes nearly all of the softmax, the loss and the positive's gradient are small
differences of large numbers, and float32 would hold little but rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from largebatch.errors import UserError
from largebatch.losses.temperature import Temperature

CombineColumns = Callable[[Tensor], Tensor]
"""Takes log-sum-exps of each column over this rank's rows, `[2, m]`, returns them over all rows."""

TILE = 1024
"""Rows and columns of a tile: 4 MiB of float32."""


class InfoNCE(NamedTuple):
    """What `info_nce` returns."""

    loss_sum: Tensor
    """Scalar, the sum over this rank's rows."""
    correct: Tensor
    """`[b]` bool, whether no document scores above the query's own. Has no gradient."""


def info_nce(
    queries_bd: Tensor,
    documents_md: Tensor,
    positives_b: Tensor,
    scale: Tensor,
    *,
    symmetric: bool = False,
    combine_columns: CombineColumns | None = None,
    tile: int = TILE,
) -> InfoNCE:
    """Sum the contrastive loss over this rank's rows (arXiv 1807.03748, eq. 4).

    Args:
        queries_bd: This rank's queries.
        documents_md: The documents of all ranks, negatives included.
        positives_b: int64, the column of each query's document; no two queries share one.
        scale: Scalar logit scale, 1 / temperature.
        symmetric: Whether documents are matched to queries as well, both directions weighing half.
            Columns that are no query's document are matched to nothing.
        combine_columns: Combines column statistics over ranks. None: this rank has all rows.
        tile: Rows and columns that are looked at together.

    The gradient that comes back is that of the sum over *all* ranks' rows with respect to this
    rank's rows and this rank's share of the columns. So every rank must call backward with the
    same factor; then adding the documents' gradients over ranks gives the exact one.
    """
    loss_sum, correct = _TiledInfoNCE.apply(  # type: ignore[no-untyped-call]
        queries_bd,
        documents_md,
        scale,
        positives_b,
        symmetric,
        combine_columns,
        tile,
    )
    return InfoNCE(loss_sum, correct)


class ContrastiveLoss(nn.Module):
    """InfoNCE with in-batch negatives and a temperature.

    Args:
        temperature: Default: fixed at 0.05.
        symmetric: Whether documents are matched to queries too, both directions weighing half.
    """

    def __init__(self, temperature: Temperature | None = None, *, symmetric: bool = False) -> None:
        super().__init__()
        self.temperature = temperature if temperature is not None else Temperature()
        self.symmetric = symmetric

    def forward(self, queries_bd: Tensor, documents_md: Tensor) -> Tensor:
        """Return the mean loss of b queries whose documents are the first b of m documents."""
        if len(documents_md) < len(queries_bd):
            raise UserError(
                f"{len(queries_bd)} queries need a document each, got {len(documents_md)}"
            )
        result = self.sum_over_rows(
            queries_bd,
            documents_md,
            torch.arange(len(queries_bd), device=queries_bd.device),
        )
        return result.loss_sum / len(queries_bd)

    def sum_over_rows(
        self,
        queries_bd: Tensor,
        documents_md: Tensor,
        positives_b: Tensor,
        *,
        symmetric: bool | None = None,
        combine_columns: CombineColumns | None = None,
    ) -> InfoNCE:
        """Return the loss summed over this rank's rows: `info_nce` with this object's settings.

        `symmetric` is for this call only; None: as the object says.
        """
        return info_nce(
            queries_bd,
            documents_md,
            positives_b,
            self.temperature(),
            symmetric=self.symmetric if symmetric is None else symmetric,
            combine_columns=combine_columns,
        )


class _TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_bd: Tensor,
        documents_md: Tensor,
        scale: Tensor,
        positives_b: Tensor,
        symmetric: bool,
        combine_columns: CombineColumns | None,
        tile: int,
    ) -> tuple[Tensor, Tensor]:
        b, m = len(queries_bd), len(documents_md)
        row_others_b = queries_bd.new_full((b,), -torch.inf)
        best_other_b = queries_bd.new_full((b,), -torch.inf)
        positive_b = queries_bd.new_zeros(b)
        # Per column: the log-sum-exp of all queries but its own, and its own query's logit.
        columns_2m = queries_bd.new_full((2, m), -torch.inf)
        column_others_m = columns_2m[0]
        logit_scale = scale.to(queries_bd.dtype)
        for rows, columns in _tiles(b, m, tile):
            logits = (logit_scale * queries_bd[rows]) @ documents_md[columns].T
            index, inside = _positives_in_tile(positives_b[rows], columns)
            own = logits.gather(1, index[:, None]).squeeze(1)
            positive_b[rows] = torch.where(inside, own, positive_b[rows])
            others = torch.where(inside, -torch.inf, own)
            logits.scatter_(1, index[:, None], others[:, None])
            row_others_b[rows] = torch.logaddexp(row_others_b[rows], logits.logsumexp(1))
            best_other_b[rows] = torch.maximum(best_other_b[rows], logits.amax(1))
            if symmetric:
                column_others_m[columns] = torch.logaddexp(
                    column_others_m[columns], logits.logsumexp(0)
                )
        zero = positive_b.new_zeros(())
        margin_b = row_others_b - positive_b
        loss_sum = torch.logaddexp(margin_b, zero).sum()  # softplus
        share_of_others_b = torch.sigmoid(margin_b)
        if symmetric:
            columns_2m[1, positives_b] = positive_b
            if combine_columns is not None:
                columns_2m = combine_columns(columns_2m)
            margin_b = columns_2m[0, positives_b] - positive_b
            loss_sum = (loss_sum + torch.logaddexp(margin_b, zero).sum()) / 2
            share_of_others_b += torch.sigmoid(margin_b)
        ctx.save_for_backward(
            queries_bd, documents_md, scale, positives_b, positive_b,
            torch.logaddexp(row_others_b, positive_b), share_of_others_b, columns_2m,
        )  # fmt: skip
        ctx.symmetric, ctx.tile = symmetric, tile
        correct_b = positive_b >= best_other_b
        ctx.mark_non_differentiable(correct_b)
        return loss_sum, correct_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor | None, ...]:
        (
            queries_bd, documents_md, scale, positives_b, positive_b,
            row_lse_b, share_of_others_b, columns_2m,
        ) = ctx.saved_tensors  # fmt: skip
        column_lse_m = torch.logaddexp(columns_2m[0], columns_2m[1])
        has_query_m = ~columns_2m[1].isneginf()
        own_query_m = torch.where(has_query_m, columns_2m[1], 0)
        grad_queries_bd = torch.zeros_like(queries_bd)
        grad_documents_md = torch.zeros_like(documents_md)
        grad_log_scale = scale.new_zeros(())
        logit_scale = scale.to(queries_bd.dtype)
        for rows, columns in _tiles(len(queries_bd), len(documents_md), ctx.tile):
            logits = (logit_scale * queries_bd[rows]) @ documents_md[columns].T
            # d loss / d logits: softmax minus one at the positive, for each direction. Its sum over
            # a row (a column) is 0, so the positive's logit may be taken off the logits that the
            # scale's gradient weighs with it: no large numbers then cancel each other there.
            grad_logits = torch.exp(logits - row_lse_b[rows, None])
            grad_log_scale += _dot(grad_logits, logits - positive_b[rows, None]).to(scale.dtype)
            if ctx.symmetric:
                column_softmax = torch.exp(logits - column_lse_m[columns]) * has_query_m[columns]
                grad_log_scale += _dot(column_softmax, logits - own_query_m[columns]).to(
                    scale.dtype
                )
                grad_logits += column_softmax
            index, inside = _positives_in_tile(positives_b[rows], columns)
            present = grad_logits.gather(1, index[:, None]).squeeze(1)
            own = torch.where(inside, -share_of_others_b[rows], present)
            grad_logits.scatter_(1, index[:, None], own[:, None])
            grad_queries_bd[rows] += grad_logits @ documents_md[columns]
            grad_documents_md[columns] += grad_logits.T @ queries_bd[rows]
        factor = grad_loss / (2 if ctx.symmetric else 1)
        return (
            grad_queries_bd.mul_(factor * logit_scale),
            grad_documents_md.mul_(factor * logit_scale),
            grad_log_scale * factor / scale,
            None, None, None, None,
        )  # fmt: skip


def _dot(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left.flatten(), right.flatten())
    return product


def _tiles(b: int, m: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, b, tile):
        for column in range(0, m, tile):
            yield slice(row, min(row + tile, b)), slice(column, min(column + tile, m))


def _positives_in_tile(positives: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return each row's positive as a column of the tile, and whether it lies in the tile."""
    width = columns.stop - columns.start
    index = positives - columns.start
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
