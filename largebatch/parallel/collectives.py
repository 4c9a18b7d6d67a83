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
        self._room = 2  # of gather_ragged; the same on all ranks, since all saw the same numbers

    def gather_ragged(self, values: Tensor, *, device: torch.device) -> list[Tensor]:
        """Return the values `[k]` of every rank, on the CPU; k may differ between ranks.

        Args:
            values: Integers, on the CPU.
            device: Where this process group's tensors live.

        One all-gather with room for as many values as any rank has had yet, and their number. Only
        when a rank has more is there a second one, with more room.
        """
        if self.world.size == 1:
            return [values]
        while True:
            sent = values.new_zeros(1 + self._room)
            sent[0] = len(values)
            fitting = values[: self._room]
            sent[1 : 1 + len(fitting)] = fitting
            sent = sent.to(device)
            out = sent.new_empty(self.world.size * len(sent))
            _all_gather(out, sent)
            table = out.view(self.world.size, -1).cpu()
            numbers = table[:, 0].tolist()
            if max(numbers) <= self._room:
                return [row[1 : 1 + k] for row, k in zip(table, numbers, strict=True)]
            self._room = 1 << (max(numbers) - 1).bit_length()

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

    def combine(
        self, logsumexps_m: Tensor, highest_m: Tensor, sums_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-sum-exps, maxima and sums over ranks, each elementwise.

        Two all-reduces; one if m is 0, which it must then be on all ranks.
        """
        if self.world.size == 1:
            return logsumexps_m, highest_m, sums_k
        m = len(logsumexps_m)
        if m == 0:
            return logsumexps_m, highest_m, self.sum(sums_k)
        most = torch.cat([logsumexps_m, highest_m])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        shift_m = most[:m].masked_fill(most[:m].isneginf(), 0)  # -inf minus -inf would be NaN
        total = torch.cat([torch.exp(logsumexps_m - shift_m), sums_k])
        dist.all_reduce(total)
        return total[:m].log_().add_(shift_m), most[m:], total[m:]

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
        if len(rows_nd) < largest:
            padded = rows_nd.new_zeros((largest, *rows_nd.shape[1:]))
            padded[: len(rows_nd)] = rows_nd
        else:
            padded = rows_nd.contiguous()
        out = padded.new_empty((len(counts) * largest, *rows_nd.shape[1:]))
        _all_gather(out, padded)
        # Close the gaps in place: a second copy of all ranks' rows would be the largest there is.
        filled = 0
        for number, count in enumerate(counts):
            start = number * largest
            if filled < start:
                out[filled : filled + count] = out[start : start + count].clone()
            filled += count
        return out[:filled]

    @staticmethod
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor, None, None]:
        largest = max(ctx.counts)
        if min(ctx.counts) == largest:
            padded = grad_Nd.contiguous()
        else:
            padded = grad_Nd.new_zeros((len(ctx.counts) * largest, *grad_Nd.shape[1:]))
            for out, part in zip(padded.split(largest), grad_Nd.split(ctx.counts), strict=True):
                out[: len(part)] = part
        own = padded.new_empty((largest, *grad_Nd.shape[1:]))
        _reduce_scatter(own, padded)
        return own[: ctx.counts[ctx.rank]], None, None
