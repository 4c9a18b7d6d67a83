"""Log-sum-exps over kinds of candidates, in tiles: no matrix of rows by candidates ever exists.

A query's softmax may run over more than documents: over other queries, and over what its document
is compared with (arXiv 2308.03281). Each kind of candidates is a side of this rank's
pairs, the rows, against rows of all ranks, the columns.

Shapes: b pairs of this rank, m rows of all ranks, k kinds of candidates, d embedding width, g width
of a guide's embeddings.

The slow version for one kind, which the tests compare with, value and every gradient:

    scores = rows_bd @ columns_md[ranges].T
    judged = scores, or those of a guide
    left_out = false_negatives | (judged > highest_b[:, None])  # see masks.py
    left_out[range(b), own_b] = True
    logits = scale * scores + hardness * scores.detach()
    values_b = logsumexp(logits.masked_fill(left_out, -inf), 1)

Each row's own candidate is left out here, since the positive stands apart from all others, as in
softplus(logsumexp(others) - positive): infonce.py says why. A score beyond its limit has no
gradient, and neither has the limit.

This is `info_nce` for losses that it does not know. That one is for the plain loss, whose second
direction it gets from the same products.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from largebatch.losses.infonce import OwnNegatives
from largebatch.losses.masks import FalseNegatives, ScoreLimits
from largebatch.losses.tiles import TILE, own_in_tile, slices


class Candidates(NamedTuple):
    """One kind of candidates for this rank's pairs."""

    side: int
    """Which of the sides given is compared with them: 0 for queries, 1 for documents."""
    ranges: tuple[slice, ...]
    """Which rows of the columns they are; they are numbered in this order, from 0."""
    own_b: Tensor
    """int64, the number of each pair's own candidate, which is left out."""
    false_negatives: FalseNegatives | None = None
    """Further ones that are left out; made for these numbers. None: none is known."""
    hardness: float = 0.0
    """How much more a candidate weighs by its score: e^(hardness * score) times, without gradient
    (arXiv 2503.04812, eq. 5)."""

    @property
    def number(self) -> int:
        """How many there are, of all ranks."""
        return sum(one.stop - one.start for one in self.ranges)


class LogSumExps(NamedTuple):
    """What `log_sum_exps` returns."""

    values_kb: Tensor
    """Over each kind of candidates, -inf where none is left."""
    highest_kb: Tensor
    """scale * the highest score of each kind, without gradient; -inf where none is left."""
    masked: Tensor
    """`[2]`, how many were left out as false negatives: by texts, and by scores of the others. Has
    no gradient."""


def log_sum_exps(
    sides: Sequence[Tensor],
    columns_md: Tensor,
    scale: Tensor,
    kinds: Sequence[Candidates],
    *,
    limits: ScoreLimits | None = None,
    tile: int = TILE,
) -> LogSumExps:
    """Return each row's log-sum-exp over each kind of candidates.

    Args:
        sides: This rank's queries and documents, `[b, d]` each.
        columns_md: Rows of all ranks.
        scale: Scalar logit scale, 1 / temperature.
        kinds: What is compared with what.
        limits: Scores beyond which a candidate is a false negative; they hold for every kind.
        tile: Rows and columns that are looked at together.

    The gradient of the columns is that of this rank's rows: it must be added up over ranks. Beyond
    its inputs and their gradients this holds a few tiles and a few numbers per row and kind; for
    inputs of half precision their gradients in float32, too.
    """
    values_kb, highest_kb, masked = _TiledLogSumExps.apply(  # type: ignore[no-untyped-call]
        columns_md, scale, tuple(kinds), limits, tile, *sides
    )
    return LogSumExps(values_kb, highest_kb, masked)


def own_log_sum_exps(
    queries_bd: Tensor,
    scale: Tensor,
    negatives: OwnNegatives,
    *,
    limits: ScoreLimits | None = None,
    hardness: float = 0.0,
) -> LogSumExps:
    """Return each row's log-sum-exp over the negatives of its own record; k is 1.

    `limits.columns_mg` are here what a guide says of the negatives, `[n, g]`.
    """
    dtype = torch.promote_types(queries_bd.dtype, torch.float32)
    owners_n = negatives.owners_n
    own_queries_nd = queries_bd[owners_n].to(dtype)
    scores_n = (own_queries_nd * negatives.embeddings_nd.to(dtype)).sum(1)
    left_out_n = negatives.masked_n
    if limits is not None:
        judged_n = scores_n.detach()
        if limits.columns_mg is not None:
            judged_n = (limits.sides[0][owners_n] * limits.columns_mg).sum(1)
        beyond_n = judged_n > limits.highest_b[owners_n]
        left_out_n = beyond_n if left_out_n is None else left_out_n | beyond_n
    by_texts, masked = scores_n.new_zeros(()), scores_n.new_zeros(())
    if negatives.masked_n is not None:
        by_texts = negatives.masked_n.sum().to(dtype)
    if left_out_n is not None:
        masked = left_out_n.sum().to(dtype)

    def in_rows(values_n: Tensor) -> Tensor:
        rows_bk = negatives._replace(masked_n=left_out_n).in_rows(values_n, len(queries_bd))
        nothing_b1 = rows_bk.new_full((len(queries_bd), 1), -torch.inf)
        return (rows_bk if negatives.max_of_one else nothing_b1).T

    logits_n = scale.to(dtype) * scores_n
    return LogSumExps(
        log_sum_exp(in_rows(logits_n + hardness * scores_n.detach()))[None],
        in_rows(logits_n.detach()).amax(0, keepdim=True),
        torch.stack([by_texts, masked - by_texts]),
    )


def log_sum_exp(values_kb: Tensor) -> Tensor:
    """Return the log-sum-exp over the first dimension; where all are -inf, -inf without gradient.

    torch's own has no gradient there that is a number.
    """
    highest_b = values_kb.detach().amax(0)
    is_empty_b = highest_b.isneginf()
    sums_b = torch.exp(values_kb - highest_b.masked_fill(is_empty_b, 0)).sum(0)
    logs_b = sums_b.masked_fill(is_empty_b, 1).log() + highest_b.masked_fill(is_empty_b, 0)
    return logs_b.masked_fill(is_empty_b, -torch.inf)


def losses_of_rows(positive_b: Tensor, others_b: Tensor, *, times: int = 1) -> Tensor:
    """Return -log(exp(positive) / Z) of each row, Z = times * exp(positive) + exp(others).

    Args:
        positive_b: Each row's logit of its own document.
        others_b: Its log-sum-exp over all other candidates.
        times: How often the positive stands in Z.
    """
    return torch.logaddexp(others_b - positive_b, positive_b.new_full((), math.log(times)))


class _TiledLogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns_md: Tensor,
        scale: Tensor,
        kinds: tuple[Candidates, ...],
        limits: ScoreLimits | None,
        tile: int,
        *sides: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _Tiles(columns_md, scale, limits, tile, sides)
        values_kb = columns_md.new_full((len(kinds), tiles.b), -torch.inf, dtype=tiles.dtype)
        highest_kb = values_kb.clone()
        by_texts, by_scores = values_kb.new_zeros(2).unbind()
        for values_b, highest_b, kind in zip(values_kb, highest_kb, kinds, strict=True):
            for rows, numbers, columns in tiles.of(kind):
                logits, spare = tiles.logits(kind, rows, columns)
                beyond = tiles.beyond(kind, rows, columns, logits, spare)
                by_texts += tiles.leave_out_(logits, kind, rows, numbers, -torch.inf)
                if beyond is not None:
                    beyond &= ~logits.isneginf()  # what is left out anyway is not counted
                    by_scores += beyond.sum()
                    logits.masked_fill_(beyond, -torch.inf)
                highest = logits.amax(1)
                highest_b[rows] = torch.maximum(highest_b[rows], highest)
                if kind.hardness:
                    factor = tiles.harder_(logits, kind)
                    highest = highest * factor
                shift = highest.masked_fill(highest.isneginf(), 0)  # -inf minus -inf would be NaN
                sums = torch.sub(logits, shift[:, None], out=spare).exp_().sum(1)
                values_b[rows] = torch.logaddexp(values_b[rows], sums.log_().add_(shift))
        ctx.save_for_backward(columns_md, scale, values_kb, *sides)
        ctx.kinds, ctx.limits, ctx.tile = kinds, limits, tile
        masked = torch.stack([by_texts, by_scores])
        ctx.mark_non_differentiable(highest_kb, masked)
        return values_kb, highest_kb, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kb: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        columns_md, scale, values_kb, *sides = ctx.saved_tensors
        tiles = _Tiles(columns_md, scale, ctx.limits, ctx.tile, sides)
        # exp(logit - inf) is 0: a row without candidates has no gradient.
        values_kb = values_kb.masked_fill(values_kb.isneginf(), torch.inf)
        grad_columns_md = torch.zeros_like(columns_md, dtype=tiles.dtype)
        grad_sides = [torch.zeros_like(side, dtype=tiles.dtype) for side in sides]
        for values_b, grad_b, kind in zip(values_kb, grad_kb, ctx.kinds, strict=True):
            grad_rows_bd, rows_bd = grad_sides[kind.side], sides[kind.side]
            for rows, numbers, columns in tiles.of(kind):
                # The same products as in the forward pass, so the same scores are beyond a limit.
                logits, spare = tiles.logits(kind, rows, columns)
                beyond = tiles.beyond(kind, rows, columns, logits, spare)
                if kind.hardness:
                    tiles.harder_(logits, kind)
                softmax = logits.sub_(values_b[rows, None]).exp_()
                tiles.leave_out_(softmax, kind, rows, numbers, 0)
                if beyond is not None:
                    softmax.masked_fill_(beyond, 0)
                softmax *= grad_b[rows, None]
                grad_rows_bd[rows].addmm_(softmax, columns_md[columns].to(tiles.dtype))
                grad_columns_md[columns].addmm_(softmax.T, rows_bd[rows].to(tiles.dtype))
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # What the scores weigh, summed over candidates, is what the rows' gradient is made of.
            of_sides = [
                torch.dot(grad.flatten(), side.to(tiles.dtype).flatten())
                for grad, side in zip(grad_sides, sides, strict=True)
            ]
            grad_scale = torch.stack(of_sides).sum().to(scale.dtype)
        return (
            grad_columns_md.mul_(tiles.scale).to(columns_md.dtype),
            grad_scale,
            *[None] * 3,
            *(
                grad.mul_(tiles.scale).to(side.dtype)
                for grad, side in zip(grad_sides, sides, strict=True)
            ),
        )


class _Tiles:
    """The tiles of a pass, alike in both directions, and memory that each uses again."""

    def __init__(
        self,
        columns_md: Tensor,
        scale: Tensor,
        limits: ScoreLimits | None,
        tile: int,
        sides: Sequence[Tensor],
    ) -> None:
        self.b = len(sides[0])
        self.dtype = torch.promote_types(columns_md.dtype, torch.float32)
        self.scale = scale.detach().to(self.dtype)
        self._columns_md, self._sides, self._limits, self._tile = columns_md, sides, limits, tile
        size = min(self.b, tile) * min(len(columns_md), tile)
        self._buffers = [columns_md.new_empty(size, dtype=self.dtype) for _ in range(2)]

    def of(self, kind: Candidates) -> Iterator[tuple[slice, slice, slice]]:
        """Yield rows, numbers of candidates and columns of each tile of a kind."""
        for rows in slices(slice(0, self.b), self._tile):
            first = 0
            for part in kind.ranges:
                for columns in slices(part, self._tile):
                    number = columns.stop - columns.start
                    yield rows, slice(first, first + number), columns
                    first += number

    def logits(self, kind: Candidates, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the logits of a tile, and memory of its size."""
        r, c = rows.stop - rows.start, columns.stop - columns.start
        logits, spare = (buffer[: r * c].view(r, c) for buffer in self._buffers)
        scaled = self.scale * self._sides[kind.side][rows].to(self.dtype)
        torch.mm(scaled, self._columns_md[columns].to(self.dtype).T, out=logits)
        return logits, spare

    def harder_(self, logits: Tensor, kind: Candidates) -> Tensor:
        """Weigh a tile's logits by their scores; return what they were multiplied by."""
        factor = 1 + kind.hardness / self.scale
        logits.mul_(factor)
        return factor

    def beyond(
        self, kind: Candidates, rows: slice, columns: slice, logits: Tensor, spare: Tensor
    ) -> Tensor | None:
        """Return which scores of a tile are beyond their rows' limits; None: there are none."""
        limits = self._limits
        if limits is None:
            return None
        highest = limits.highest_b[rows, None]
        if limits.columns_mg is None:
            return logits > self.scale * highest
        guide_rows, guide_columns = limits.sides[kind.side][rows], limits.columns_mg[columns]
        if guide_rows.dtype == spare.dtype:
            return torch.mm(guide_rows, guide_columns.T, out=spare) > highest
        return torch.mm(guide_rows, guide_columns.T) > highest

    @staticmethod
    def leave_out_(
        tile_rc: Tensor, kind: Candidates, rows: slice, numbers: slice, value: float
    ) -> Tensor | int:
        """Overwrite each row's own candidate and its false negatives; return how many these are."""
        mask = None
        if kind.false_negatives is not None:
            mask = kind.false_negatives.fill_(tile_rc, rows, numbers, value)
        index, inside = own_in_tile(kind.own_b[rows], numbers)
        present = tile_rc.gather(1, index).squeeze(1)
        tile_rc.scatter_(1, index, torch.where(inside, value, present)[:, None])
        return 0 if mask is None else mask.sum()
