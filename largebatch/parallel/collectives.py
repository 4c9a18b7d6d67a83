"""Collectives: everything that ranks tell each other, and the identity where there is one rank.

What hosts need to know travels on CPU tensors, by a backend of its own (gloo): a host then waits
for other hosts, never for its device.

Shapes: n rows of this rank (they may differ between ranks), N rows of all ranks, d width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
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


class Gathering(NamedTuple):
    """An all-gather of rows that is under way."""

    counts: list[int]
    """Rows of each rank."""
    sent: Tensor
    """This rank's rows, and what fills them up to as many as any rank has."""
    received: Tensor
    """Those of all ranks, once `work` is done."""
    work: dist.Work


class Collectives:
    """Collectives over all ranks of the default process group, or of none.

    Every method but the properties must be called by all ranks, in the same order. Without a
    process group each returns what it was given.
    """

    def __init__(self) -> None:
        self._active = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if self._active else (0, 1)
        self.world = World(rank=rank, size=size)
        self._hosts = _group_of_hosts() if self._active else None
        self._room = 4  # of gather_ragged; the same on all ranks, since all saw the same numbers

    def gather_ragged(
        self, values: npt.NDArray[np.int64], *, most: int | None = None
    ) -> list[npt.NDArray[np.int64]]:
        """Return the values `[k]` of every rank; k may differ between ranks.

        Args:
            values: Of this rank.
            most: The highest k of all ranks, if they know it.

        One all-gather. Where `most` isn't known it has room for as many values as any rank has had
        yet; only when a rank has more is there a second one, with more room.
        """
        if self.world.size == 1:
            return [values]
        while True:
            room = self._room if most is None else most
            sent = np.zeros(1 + room, np.int64)
            sent[0] = len(values)
            fitting = values[:room]
            sent[1 : 1 + len(fitting)] = fitting
            table = np.empty((self.world.size, len(sent)), np.int64)
            _all_gather(torch.from_numpy(table).view(-1), torch.from_numpy(sent), group=self._hosts)
            numbers = table[:, 0].tolist()
            if max(numbers) <= room:
                return [row[1 : 1 + k] for row, k in zip(table, numbers, strict=True)]
            self._room = 1 << (max(numbers) - 1).bit_length()

    def highest(self, number: int) -> int:
        """Return the highest of the ranks' numbers."""
        return int(self.max(torch.tensor([number])).numpy()[0])

    @torch.no_grad()
    def start_gather(self, rows_nd: Tensor, counts: list[int]) -> Gathering:
        """Begin to send this rank's rows to all others, of which there are some, and get theirs.

        Args:
            rows_nd: This rank's rows, `counts[rank]` of them; not to be changed before the end.
            counts: Rows of each rank.
        """
        assert len(rows_nd) == counts[self.world.rank]
        sent, largest = rows_nd.contiguous(), max(counts)
        if len(rows_nd) < largest:
            sent = rows_nd.new_zeros((largest, *rows_nd.shape[1:]))
            sent[: len(rows_nd)] = rows_nd
        received = sent.new_empty((len(counts) * largest, *rows_nd.shape[1:]))
        work = _all_gather(received, sent, async_op=True)
        return Gathering(counts, sent, received, work)

    def gather_rows(
        self, rows_nd: Tensor, counts: list[int], *, started: Gathering | None = None
    ) -> Gathered:
        """Return the rows of all ranks, differentiable for all of them.

        Args:
            rows_nd: This rank's rows, `counts[rank]` of them.
            counts: Rows of each rank.
            started: What `start_gather` returned for the same rows. None: it starts here.

        One all-gather forward and one reduce-scatter backward, whatever the counts.
        """
        if self.world.size == 1:
            assert len(rows_nd) == counts[0]
            return Gathered(rows_nd, counts)
        started = started or self.start_gather(rows_nd.detach(), counts)
        assert started.counts == counts
        rows = _GatherRows.apply(rows_nd, started, self.world.rank)  # type: ignore[no-untyped-call]
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
        group = self._hosts if values.device.type == "cpu" else None
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
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

    def all_succeed(self, action: Callable[[], Result]) -> Result:
        """Run `action`, in which no ranks meet, on every rank; return what it gave on this one.

        Raises:
            UserError: On every rank, if the action raised it on one: all ranks fail together.
            RuntimeError: On every rank but the one whose action raised another error, as it is.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        if self.world.size > 1:
            said = None if error is None else (type(error).__name__, str(error))
            failures = [(n, *one) for n, one in enumerate(self.gather_objects(said)) if one]
            if failures and (error is None or isinstance(error, UserError)):
                rank, kind, message = failures[0]
                if kind == UserError.__name__:
                    raise UserError(message) from error
                raise RuntimeError(f"rank {rank} failed: {kind}: {message}")
        if error is not None:
            raise error
        return result

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            dist.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's small value, on every rank. For use outside a step."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._hosts)
        return values


def _group_of_hosts() -> dist.ProcessGroup | None:
    """Return the group for CPU tensors; None: the default group has a backend for them."""
    if "cpu:" in str(dist.get_backend_config()):
        return None
    return dist.new_group(backend="gloo")  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_nd: Tensor, started: Gathering, rank: int) -> Tensor:  # noqa: ARG004
        counts, out = started.counts, started.received
        ctx.counts, ctx.rank = counts, rank
        started.work.wait()
        # Close the gaps in place: a second copy of all ranks' rows would be the largest there is.
        filled, largest = 0, max(counts)
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
