"""The order: the endless order in which one source gives its records. Pure arithmetic.

1. Each epoch permutes the source's segments, and the records inside each, and lays them end to end.
2. That line is cut into lanes of equal length. Positions take the next record of each lane in turn,
   so a batch comes from all over the source, while each lane is read from begin to end.
3. Epoch follows epoch: the first position of the next epoch comes right after the last of this one.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where records of a source are."""

    segments: IndexArray
    """`[n]`, number of the segment that each is in."""
    offsets: IndexArray
    """`[n]`, number of the record inside its segment."""


class SourceOrder:
    """The order of one source.

    Args:
        segment_sizes: `[S]` records of each segment, all above 0.
        epoch_records: Records that an epoch gives; the rest of its line is left out, which is
            another one in each epoch.
        lanes: Places of the line that are read side by side.
        key: Seeds of the order.
    """

    def __init__(
        self,
        segment_sizes: npt.NDArray[Any],
        *,
        epoch_records: int,
        lanes: int,
        key: tuple[int, ...],
    ) -> None:
        self.segment_sizes = np.asarray(segment_sizes, np.int64)
        assert 0 < epoch_records <= self.segment_sizes.sum()
        self.epoch_records = epoch_records
        self.lanes = lanes
        self.key = key
        lane_sizes = (epoch_records - np.arange(lanes, dtype=np.int64) + lanes - 1) // lanes
        self._lane_begins = np.cumsum(lane_sizes) - lane_sizes
        self._line_of_epoch = lru_cache(maxsize=2)(self._line)
        self._order_in_segment = lru_cache(maxsize=4 * lanes)(self._segment_order)

    def __reduce__(self) -> tuple[Any, ...]:
        # On its way to a loader process that is not forked: the caches can't be sent.
        make = partial(
            SourceOrder, epoch_records=self.epoch_records, lanes=self.lanes, key=self.key
        )
        return make, (self.segment_sizes,)

    def lanes_of(self, positions: IndexArray) -> IndexArray:
        """Return `[n]` the lane that each of `n` positions is on."""
        return positions % self.epoch_records % self.lanes

    def places(self, positions: IndexArray) -> Place:
        """Return where the records at some positions are; `[n]`, from 0, in any order."""
        segments, offsets = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self.epoch_records
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            segments[here], offsets[here] = self._places_in_epoch(
                epoch, positions[here] % self.epoch_records
            )
        return Place(segments, offsets)

    def _places_in_epoch(self, epoch: int, positions: IndexArray) -> Place:
        on_line = self._lane_begins[positions % self.lanes] + positions // self.lanes
        order, ends = self._line_of_epoch(epoch)
        numbers = np.searchsorted(ends, on_line, side="right")
        segments = order[numbers]
        inside = on_line - (ends[numbers] - self.segment_sizes[segments])
        offsets = np.empty_like(inside)
        for segment in np.unique(segments).tolist():
            here = segments == segment
            offsets[here] = self._order_in_segment(epoch, segment)[inside[here]]
        return Place(segments, offsets)

    def _line(self, epoch: int) -> tuple[IndexArray, IndexArray]:
        order = _permutation(len(self.segment_sizes), *self.key, epoch)
        return order, np.cumsum(self.segment_sizes[order])

    def _segment_order(self, epoch: int, segment: int) -> IndexArray:
        return _permutation(int(self.segment_sizes[segment]), *self.key, epoch, segment + 1)


def _permutation(size: int, *key: int) -> IndexArray:
    # numpy promises that RandomState's numbers never change between its versions (NEP 19); those of
    # the newer Generator may, and a resumed run would see other batches.
    bits = np.random.MT19937(np.random.SeedSequence(key))
    return np.random.RandomState(bits).permutation(size).astype(np.int64)
