"""Collectives: everything that ranks tell each other, and the identity where there is one rank.

Shapes: n rows of this rank (they may differ between ranks), N rows of all ranks, d width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError
from largebatch.world import World

Result = TypeVar("Result")

# torch 2.13 renamed both; 2.10 has the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gathered(NamedTuple):
    """The rows of all ranks, rank after rank."""

    rows: Tensor
    """`[N, d]`; its gradient is added up over ranks and goes back to the rows' owners."""
    counts: list[int]
    """Rows of each rank."""


class Collectives:
    """Collectives over all ranks of the default process group, or of none.

    Every method but the properties must be called by all ranks, in the same order. Without a
    process group each returns what it was given.
    """

    def __init__(self) -> None:
        self._active = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if self._active else (0, 1)
        self.world = World(rank=rank, size=size)

    def gather_counts(self, numbers: Tensor) -> Tensor:
        """Return the numbers `[k]` (int64) of every rank, `[world size, k]`."""
        if self.world.size == 1:
            return numbers[None]
        out = numbers.new_empty(self.world.size * len(numbers))
        _all_gather(out, numbers.contiguous())
        return out.view(self.world.size, len(numbers))

    def gather_rows(self, rows_nd: Tensor, counts: list[int]) -> Gathered:
        """Return the rows of all ranks, differentiable for all of them.

        Args:
            rows_nd: This rank's rows, `counts[rank]` of them.
            counts: Rows of each rank.

        One all-gather forward and one reduce-scatter backward, whatever the counts.
        """
        assert len(rows_nd) == counts[self.world.rank]
        if self.world.size == 1:
            return Gathered(rows_nd, counts)
        rows = _GatherRows.apply(rows_nd, counts, self.world.rank)  # type: ignore[no-untyped-call]
        return Gathered(rows, counts)

    def combine_logsumexp(self, values: Tensor) -> Tensor:
        """Return the elementwise log-sum-exp over ranks."""
        if self.world.size == 1:
            return values
        highest = values.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        highest.masked_fill_(highest.isneginf(), 0)  # -inf minus -inf would be NaN
        total = torch.exp(values - highest)
        dist.all_reduce(total)
        return total.log_().add_(highest)

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        if self.world.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        if self.world.size == 1:
            return values
        highest = values.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest

    def broadcast_(self, values: Tensor) -> None:
        """Overwrite the values by rank 0's."""
        if self.world.size > 1:
            dist.broadcast(values, src=0)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and return its small result on every rank.

        Raises:
            UserError: On every rank, if the action raised it on rank 0: all ranks fail together.
        """
        outcome: list[tuple[Result | None, str | None]] = [(None, None)]
        if self.world.is_main:
            try:
                outcome = [(action(), None)]
            except UserError as error:
                if self.world.size == 1:
                    raise
                outcome = [(None, str(error))]
        if self.world.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, message = outcome[0]
        if message is not None:
            raise UserError(message)
        return cast(Result, result)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            dist.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's small value, on every rank. For use outside a step."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_nd: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        largest = max(counts)
        padded = _pad_rows(rows_nd, largest)
        out = padded.new_empty((len(counts) * largest, *rows_nd.shape[1:]))
        _all_gather(out, padded)
        if min(counts) == largest:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(largest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor, None, None]:
        largest = max(ctx.counts)
        parts = grad_Nd.split(ctx.counts)
        padded = torch.cat([_pad_rows(part, largest) for part in parts])
        out = padded.new_empty((largest, *grad_Nd.shape[1:]))
        _reduce_scatter(out, padded)
        return out[: ctx.counts[ctx.rank]], None, None


def _pad_rows(rows: Tensor, number: int) -> Tensor:
    if len(rows) == number:
        return rows.contiguous()
    padding = rows.new_zeros((number - len(rows), *rows.shape[1:]))
    return torch.cat([rows, padding])
