"""The schedule: which record is in which row of which global batch. Pure arithmetic.

A global batch is a function of the data set's segments, the batch size, the seed and the step, and
of nothing else: not of ranks, loader workers, or what ran before. So a run resumes from its step
alone, and any number of ranks trains on the same batches.

1. Each epoch permutes the segments, and the records inside each, and lays them on one tape.
2. The tape is cut into as many lanes as the config says. Each step takes the next rows of every
   lane, so a batch comes from all over the data set while reads stay sequential.
3. Records beyond the last whole batch of the tape are left out of that epoch.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.errors import UserError

IndexArray = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where rows of a batch are."""

    segments: IndexArray
    """`[n]`, number of each row's segment."""
    offsets: IndexArray
    """`[n]`, number of the record inside its segment."""


class Schedule:
    """The global batches of a run.

    Args:
        segment_sizes: `[S]` records of each segment.
        global_batch: Rows of a batch.
        seed: Decides the order.
        lanes: Places of the tape that a batch is drawn from.

    Raises:
        UserError: There are fewer records than a batch has rows.
    """

    def __init__(
        self, segment_sizes: npt.NDArray[Any], *, global_batch: int, seed: int, lanes: int
    ) -> None:
        self.segment_sizes = np.asarray(segment_sizes, np.int64)
        self.num_records = int(self.segment_sizes.sum())
        if self.num_records < global_batch:
            raise UserError(
                f"global_batch={global_batch} is more than the {self.num_records} records there "
                "are; lower it, or add shards"
            )
        self.global_batch = global_batch
        self.seed = seed
        self.lanes = lanes
        self.steps_per_epoch = self.num_records // global_batch
        self.records_left_out = self.num_records % global_batch
        """Records that an epoch leaves out; others in each epoch."""
        num_lanes = min(lanes, global_batch)
        lane_ends = np.arange(num_lanes + 1, dtype=np.int64) * global_batch // num_lanes
        lane_of_row = np.repeat(np.arange(num_lanes), np.diff(lane_ends))
        self._lane_start = lane_ends[lane_of_row]
        self._lane_rows = np.diff(lane_ends)[lane_of_row]
        self._tape_of_epoch = lru_cache(maxsize=2)(self._tape)
        self._order_in_segment = lru_cache(maxsize=4 * num_lanes)(self._segment_order)

    def __reduce__(self) -> tuple[Any, ...]:
        # On its way to a loader process that is not forked: the caches can't be sent.
        make = partial(Schedule, global_batch=self.global_batch, seed=self.seed, lanes=self.lanes)
        return make, (self.segment_sizes,)

    def epoch(self, step: int) -> int:
        """Return the number of the epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def rows(self, step: int, rows: range) -> Place:
        """Return where some rows of the global batch of a step are."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        row = np.arange(rows.start, rows.stop, dtype=np.int64)
        start, width = self._lane_start[row], self._lane_rows[row]
        position = start * self.steps_per_epoch + step_in_epoch * width + (row - start)
        order, ends = self._tape_of_epoch(epoch)
        place_on_tape = np.searchsorted(ends, position, side="right")
        segments = order[place_on_tape]
        sizes = self.segment_sizes[segments]
        positions_inside = position - (ends[place_on_tape] - sizes)
        offsets = np.empty_like(position)
        for segment in np.unique(segments):
            here = segments == segment
            offsets[here] = self._order_in_segment(epoch, int(segment))[positions_inside[here]]
        return Place(segments, offsets)

    def _tape(self, epoch: int) -> tuple[IndexArray, IndexArray]:
        order = _permutation(len(self.segment_sizes), self.seed, epoch)
        return order, np.cumsum(self.segment_sizes[order])

    def _segment_order(self, epoch: int, segment: int) -> IndexArray:
        return _permutation(int(self.segment_sizes[segment]), self.seed, epoch, segment + 1)


def _permutation(size: int, *key: int) -> IndexArray:
    # numpy promises that RandomState's numbers never change between its versions (NEP 19); those of
    # the newer Generator may, and a resumed run would see other batches.
    bits = np.random.MT19937(np.random.SeedSequence(key))
    return np.random.RandomState(bits).permutation(size).astype(np.int64)
