"""InfoNCE over a global batch, in tiles: no matrix of all queries by all documents ever exists.

Shapes: b queries of this rank, m documents of all ranks (columns), d embedding width.

The slow version, which the tests compare with, value and every gradient:

    logits_bm = scale * queries_bd @ documents_md.T
    own_b = logits_bm[range(b), positives_b]
    logits_bm[false_negatives_bm] = -inf  # see masks.py; no query's own document is one
    # own negatives: a row's logits go on with those of its own
    loss = (logsumexp(logits_bm, 1) - own_b).sum()
    # symmetric: each positive document must also find its query among all queries of all ranks,
    # so its log-sum-exp runs over the rows of every rank
    columns_m = logsumexp_over_ranks(logsumexp(logits_bm, 0))
    loss = (loss + (columns_m[positives_b] - own_b).sum()) / 2

The fast one keeps the positive apart from the others, as in softplus(logsumexp(others) - positive):
where the positive takes nearly all of the softmax, the loss and the positive's gradient are small
differences of large numbers, and float32 would hold little but rounding. Logits, sums and gradients
are float32 (float64 for such inputs) whatever the inputs are: a tile's rows are converted with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from largebatch.losses.masks import FalseNegatives
from largebatch.losses.tiles import TILE, own_in_tile, slices

Combine = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Takes this rank's log-sum-exps `[m]`, maxima `[m]` and sums `[k]`, returns those over all ranks,
each elementwise. m is 0 where only sums are asked for."""


class OwnNegatives(NamedTuple):
    """Negatives that only the query of their own record is contrasted with."""

    embeddings_nd: Tensor
    """This rank's."""
    owners_n: Tensor
    """int64, the row of each one's query."""
    places_n: Tensor
    """int64, how many negatives of the same owner come before each."""
    max_of_one: int
    """Negatives of the row that has most."""
    masked_n: Tensor | None
    """bool, which are false ones and left out; None: nobody knows."""

    def in_rows(self, values_n: Tensor, num_rows: int) -> Tensor:
        """Return values in the rows of their owners, `[b, max_of_one]`, -inf where none is."""
        rows_bk = values_n.new_full((num_rows, self.max_of_one), -torch.inf)
        if self.masked_n is not None:
            values_n = values_n.masked_fill(self.masked_n, -torch.inf)
        rows_bk[self.owners_n, self.places_n] = values_n
        return rows_bk


class InfoNCE(NamedTuple):
    """What `info_nce` returns."""

    loss_sum: Tensor
    """Scalar, the sum over this rank's rows."""
    correct: Tensor
    """`[b]` bool, whether no document scores above the query's own; false negatives don't count.
    Has no gradient."""
    totals: Tensor
    """`[4]`, summed over all ranks' rows: the loss, the correct rows, the negatives that are left
    out as false ones, and the rows that have no negative; the same on all ranks. Has no gradient.
    """


def info_nce(
    queries_bd: Tensor,
    documents_md: Tensor,
    positives_b: Tensor,
    scale: Tensor,
    *,
    symmetric: bool = False,
    false_negatives: FalseNegatives | None = None,
    own_negatives: OwnNegatives | None = None,
    combine: Combine | None = None,
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
        false_negatives: What a row is not contrasted with, in either direction; it must have been
            made for these rows and columns. None: every column but its own is a negative.
        own_negatives: Further negatives of single rows. They are matched to nothing in the other
            direction.
        combine: Combines statistics over ranks; called once. None: this rank has all rows.
        tile: Rows and columns that are looked at together.

    The gradient that comes back is that of the sum over *all* ranks' rows with respect to this
    rank's rows and this rank's share of the columns. So every rank must call backward with the
    same factor; then adding the documents' gradients over ranks gives the exact one.

    Beyond its inputs and their gradients this holds a few tiles, a few numbers per row and column,
    and, for inputs of half precision, the queries' gradient in float32.
    """
    own_logits_n = None
    if own_negatives is not None:
        # Few, one dot product each: autograd takes care of them, but for the scale.
        dtype = _at_least_float32(queries_bd.dtype)
        own_queries_nd = queries_bd[own_negatives.owners_n].to(dtype)
        products_nd = own_queries_nd * own_negatives.embeddings_nd.to(dtype)
        own_logits_n = scale.detach().to(dtype) * products_nd.sum(1)
    loss_sum, correct, totals = _TiledInfoNCE.apply(  # type: ignore[no-untyped-call]
        queries_bd,
        documents_md,
        scale,
        own_logits_n,
        own_negatives,
        positives_b,
        symmetric,
        false_negatives,
        combine,
        tile,
    )
    return InfoNCE(loss_sum, correct, totals)


class _TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_bd: Tensor,
        documents_md: Tensor,
        scale: Tensor,
        own_logits_n: Tensor | None,
        own_negatives: OwnNegatives | None,
        positives_b: Tensor,
        symmetric: bool,
        false_negatives: FalseNegatives | None,
        combine: Combine | None,
        tile: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, m = len(queries_bd), len(documents_md)
        dtype = _at_least_float32(queries_bd.dtype)
        row_others_b = queries_bd.new_full((b,), -torch.inf, dtype=dtype)
        best_other_b = queries_bd.new_full((b,), -torch.inf, dtype=dtype)
        positive_b = queries_bd.new_zeros(b, dtype=dtype)
        column_others_m = queries_bd.new_full((m if symmetric else 0,), -torch.inf, dtype=dtype)
        masked = queries_bd.new_zeros((), dtype=dtype)
        logit_scale = scale.to(dtype)
        buffers = _Buffers(2, min(b, tile) * min(m, tile), positive_b)
        for rows in slices(slice(0, b), tile):
            scaled = logit_scale * queries_bd[rows].to(dtype)
            for columns in slices(slice(0, m), tile):
                logits, spare = buffers.of_tile(rows, columns)
                torch.mm(scaled, documents_md[columns].to(dtype).T, out=logits)
                if false_negatives is not None:
                    mask = false_negatives.fill_(logits, rows, columns, -torch.inf)
                    if mask is not None:
                        masked += mask.sum()
                index, inside = own_in_tile(positives_b[rows], columns)
                own = logits.gather(1, index).squeeze(1)
                positive_b[rows] = torch.where(inside, own, positive_b[rows])
                logits.scatter_(1, index, torch.where(inside, -torch.inf, own)[:, None])
                highest, others = _logsumexp(logits, 1, spare)
                best_other_b[rows] = torch.maximum(best_other_b[rows], highest)
                row_others_b[rows] = torch.logaddexp(row_others_b[rows], others)
                if symmetric:
                    _, others = _logsumexp(logits, 0, spare)
                    column_others_m[columns] = torch.logaddexp(column_others_m[columns], others)
        if own_negatives is not None and own_negatives.max_of_one > 0:
            assert own_logits_n is not None
            rows_bk = own_negatives.in_rows(own_logits_n, b)
            best_other_b = torch.maximum(best_other_b, rows_bk.amax(1))
            row_others_b = torch.logaddexp(row_others_b, rows_bk.logsumexp(1))
            if own_negatives.masked_n is not None:
                masked += own_negatives.masked_n.sum()
        correct_b = positive_b >= best_other_b
        margin_b = row_others_b - positive_b
        loss_sum = _softplus(margin_b).sum()
        share_of_others_b = torch.sigmoid(margin_b)
        without_negatives = row_others_b.isneginf().sum().to(dtype)
        totals = torch.stack([loss_sum, correct_b.sum().to(dtype), masked, without_negatives])
        # Each column's own query is one rank's row; the highest over ranks finds it.
        column_own_m = torch.full_like(column_others_m, -torch.inf)
        if symmetric:
            column_own_m[positives_b] = positive_b
        if combine is not None:
            column_others_m, column_own_m, totals = combine(column_others_m, column_own_m, totals)
        if symmetric:
            margin_b = column_others_m[positives_b] - positive_b
            loss_sum = (loss_sum + _softplus(margin_b).sum()) / 2
            share_of_others_b += torch.sigmoid(margin_b)
            # The columns' statistics are of all ranks by now, and so is their loss.
            losses_m = _softplus(column_others_m - column_own_m)
            of_columns = torch.where(column_own_m.isneginf(), 0, losses_m).sum()
            totals = torch.cat([(totals[:1] + of_columns) / 2, totals[1:]])
        ctx.save_for_backward(
            queries_bd, documents_md, scale, positives_b, positive_b,
            torch.logaddexp(row_others_b, positive_b), share_of_others_b,
            torch.logaddexp(column_others_m, column_own_m), column_own_m, own_logits_n,
        )  # fmt: skip
        ctx.own_negatives = own_negatives
        ctx.symmetric, ctx.false_negatives, ctx.tile = symmetric, false_negatives, tile
        ctx.mark_non_differentiable(correct_b, totals)
        return loss_sum, correct_b, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (
            queries_bd, documents_md, scale, positives_b, positive_b,
            row_lse_b, share_of_others_b, column_lse_m, column_own_m, own_logits_n,
        ) = ctx.saved_tensors  # fmt: skip
        b, m, tile, dtype = len(queries_bd), len(documents_md), ctx.tile, positive_b.dtype
        no_query_m = column_own_m.isneginf()
        column_own_m = column_own_m.masked_fill(no_query_m, 0)
        # exp(logit - inf) is 0: columns without a query are matched to nothing.
        column_lse_m = column_lse_m.masked_fill(no_query_m, torch.inf)
        logit_scale = scale.to(dtype)
        weight = grad_loss / (2 if ctx.symmetric else 1)
        grad_log_scale = torch.zeros_like(logit_scale)
        grad_queries_bd = torch.zeros_like(queries_bd, dtype=dtype)
        grad_documents_md = torch.empty_like(documents_md)
        buffers = _Buffers(4, min(b, tile) * min(m, tile), positive_b)
        grad_own_n = None
        if own_logits_n is not None:
            owners_n, masked_n = ctx.own_negatives.owners_n, ctx.own_negatives.masked_n
            softmax_n = torch.exp(own_logits_n - row_lse_b[owners_n])
            if masked_n is not None:
                softmax_n.masked_fill_(masked_n, 0)
            grad_own_n = weight * softmax_n
            grad_log_scale += torch.dot(softmax_n, own_logits_n - positive_b[owners_n])
        # Columns outside: only their gradient, the larger one, is then finished tile by tile, and
        # needs no second copy of higher precision.
        for columns in slices(slice(0, m), tile):
            documents = documents_md[columns].to(dtype)
            grad_documents = torch.zeros_like(documents)
            for rows in slices(slice(0, b), tile):
                logits, grad_logits, column_softmax, spare = buffers.of_tile(rows, columns)
                queries = queries_bd[rows].to(dtype)
                torch.mm(logit_scale * queries, documents.T, out=logits)
                # d loss / d logits: softmax minus one at the positive, for each direction. Its sum
                # over a row (a column) is 0, so the positive's logit may be taken off the logits
                # that the scale's gradient weighs with it: no large numbers cancel each other.
                parts = [(grad_logits, row_lse_b[rows, None], positive_b[rows, None])]
                if ctx.symmetric:
                    parts.append((column_softmax, column_lse_m[columns], column_own_m[columns]))
                for softmax, lse, own in parts:
                    torch.sub(logits, lse, out=softmax).exp_()
                    if ctx.false_negatives is not None:
                        ctx.false_negatives.fill_(softmax, rows, columns, 0)
                    if ctx.needs_input_grad[2]:
                        torch.sub(logits, own, out=spare)
                        grad_log_scale += torch.dot(softmax.flatten(), spare.flatten())
                if ctx.symmetric:
                    grad_logits += column_softmax
                index, inside = own_in_tile(positives_b[rows], columns)
                present = grad_logits.gather(1, index).squeeze(1)
                own = torch.where(inside, -share_of_others_b[rows], present)
                grad_logits.scatter_(1, index, own[:, None])
                grad_queries_bd[rows].addmm_(grad_logits, documents)
                grad_documents.addmm_(grad_logits.T, queries)
            grad_documents_md[columns] = grad_documents.mul_(weight * logit_scale)
        return (
            grad_queries_bd.mul_(weight * logit_scale).to(queries_bd.dtype),
            grad_documents_md,
            (grad_log_scale * weight / logit_scale).to(scale.dtype),
            grad_own_n, *[None] * 6,
        )  # fmt: skip


class _Buffers:
    """Memory that every tile uses again."""

    def __init__(self, number: int, size: int, like: Tensor) -> None:
        self.flat = [like.new_empty(size) for _ in range(number)]

    def of_tile(self, rows: slice, columns: slice) -> list[Tensor]:
        r, c = rows.stop - rows.start, columns.stop - columns.start
        return [flat[: r * c].view(r, c) for flat in self.flat]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _softplus(margins: Tensor) -> Tensor:
    return torch.logaddexp(margins, margins.new_zeros(()))


def _logsumexp(logits: Tensor, dim: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return maximum and log-sum-exp over a dimension, with the exponentials in `spare`."""
    highest = logits.amax(dim)
    shift = highest.masked_fill(highest.isneginf(), 0)  # -inf minus -inf would be NaN
    torch.sub(logits, shift.unsqueeze(dim), out=spare).exp_()
    return highest, spare.sum(dim).log_().add_(shift)
