"""The schedule: which record is in which row of which global batch. Pure arithmetic.

A global batch is a function of the sources' segments, the options of the data, the seed and the
step, and of nothing else: not of ranks, loader workers, or what ran before. So a run resumes from
its step alone, and any number of ranks trains on the same batches.

1. The mixture says which source gives the batch, or, in mixed batches, each of its rows.
2. The source's order says where its next records are: every record once in an epoch.
3. The rows are put in the order of the lanes that they are on, so that a rank, which takes a part
   of the batch, reads few segments, and of mixed batches gets some of every source.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.errors import UserError
from largebatch.order.mixture import Mixture
from largebatch.order.source_order import SourceOrder

IndexArray = npt.NDArray[np.int64]


class SourceShape(NamedTuple):
    """All that the schedule knows of a source."""

    name: str
    """Its name, for messages."""
    segment_sizes: npt.NDArray[Any]
    """`[S]` records of each segment; none, if no batch takes from it."""
    weight: float | None = None
    """Its weight relative to the others; None for all: their sizes decide."""
    epochs: float | None = None
    """How often it is gone through at most."""


class Reweighting(NamedTuple):
    """A change of the mixture."""

    from_step: int
    """First step that it holds for."""
    weights: dict[str, float]
    """New weights, by the source's name; the others keep theirs."""


class Rows(NamedTuple):
    """Where rows of a batch are."""

    sources: IndexArray
    """`[n]`, number of each row's source."""
    segments: IndexArray
    """`[n]`, number of its segment in that source."""
    offsets: IndexArray
    """`[n]`, number of the record inside its segment."""


class Schedule:
    """The global batches of a run.

    Args:
        sources: What the batches are made of.
        global_batch: Rows of a batch.
        seed: Decides the order.
        lanes: Places of a source that a batch is drawn from.
        mixed: Whether a batch holds rows of all sources; otherwise it is from one.
        carry: Whether records that fill no batch begin the next epoch; otherwise it goes without.
        size_exponent: A source without a weight weighs its number of records to this power.
        reweightings: Changes of the weights, in the order of their steps.

    `num_steps` is how many batches there are, or None if they never end. A source whose weight is
    always 0 gives nothing, and may have no records.

    Raises:
        UserError: A source has fewer records than a batch takes of it.
    """

    def __init__(
        self,
        sources: Sequence[SourceShape],
        *,
        global_batch: int,
        seed: int,
        lanes: int,
        mixed: bool = False,
        carry: bool = True,
        size_exponent: float = 1.0,
        reweightings: Sequence[Reweighting] = (),
    ) -> None:
        assert carry or not mixed
        self.sources = list(sources)
        self.global_batch = global_batch
        self.mixed = mixed
        self._rebuild = partial(
            Schedule,
            global_batch=global_batch,
            seed=seed,
            lanes=lanes,
            mixed=mixed,
            carry=carry,
            size_exponent=size_exponent,
            reweightings=list(reweightings),
        )
        self.source_records = np.array([source.segment_sizes.sum() for source in sources], np.int64)
        """`[S]` records of each source."""
        self.rows_per_draw = 1 if mixed else global_batch
        weights = self._weights(size_exponent, reweightings)
        self.is_drawn = np.any([values for _, values in weights], axis=0)
        """`[S]` whether each source ever has a weight above 0."""
        self.epoch_records = np.where(self.is_drawn, self.source_records, 0)
        """`[S]` records that an epoch of each source gives."""
        if not mixed:
            self._check_sizes(global_batch * self.is_drawn)
            if not carry:
                self.epoch_records -= self.epoch_records % global_batch
        self.mixture = Mixture(weights, max_draws=self._max_draws(), seed=seed)
        draws = self.mixture.num_draws
        self.num_steps = None if draws is None else draws * self.rows_per_draw // global_batch
        if mixed:
            for interval in self.mixture.intervals:
                self._check_sizes(
                    np.ceil(np.array(interval.shares) * global_batch).astype(np.int64)
                )
        self.orders = {
            number: SourceOrder(
                source.segment_sizes, epoch_records=int(records), lanes=lanes, key=(seed, number)
            )
            for number, (source, records) in enumerate(
                zip(self.sources, self.epoch_records, strict=True)
            )
            if records
        }
        self._batch = lru_cache(maxsize=2)(self._whole_batch)

    def __reduce__(self) -> tuple[Any, ...]:
        # On its way to a loader process that is not forked: the caches can't be sent.
        return self._rebuild, (self.sources,)

    @property
    def num_records(self) -> int:
        """Records of all sources."""
        return int(self.source_records.sum())

    def rows(self, step: int, rows: range) -> Rows:
        """Return where some rows of the global batch of a step are."""
        sources, positions = (array[rows.start : rows.stop] for array in self._batch(step))
        segments, offsets = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(sources).tolist():
            here = sources == number
            segments[here], offsets[here] = self.orders[number].places(positions[here])
        return Rows(sources, segments, offsets)

    def source_of(self, step: int) -> int | None:
        """Return the number of the source that a step's batch is from; None if it is mixed."""
        return None if self.mixed else int(self.mixture.draws(step, step + 1).sources[0])

    def rows_given(self, step: int) -> IndexArray:
        """Return `[S]` how many rows each source gives before a step."""
        draw = step * self.global_batch // self.rows_per_draw
        return self.mixture.given(draw) * self.rows_per_draw

    def shares(self, step: int) -> tuple[float, ...]:
        """Return `[S]` the share of the rows around a step that each source should give."""
        return self.mixture.shares(step * self.global_batch // self.rows_per_draw)

    def epochs(self, step: int) -> npt.NDArray[np.float64]:
        """Return `[S]` how often each source was gone through before a step."""
        return self.rows_given(step) / np.maximum(self.epoch_records, 1)

    def left_out(self) -> IndexArray:
        """Return `[S]` records that each epoch of a source leaves out; others in each."""
        return np.where(self.is_drawn, self.source_records - self.epoch_records, 0)

    def _whole_batch(self, step: int) -> tuple[IndexArray, IndexArray]:
        """Return the source of each row and its position on that source's order."""
        first = step * self.global_batch // self.rows_per_draw
        draws = self.mixture.draws(first, first + self.global_batch // self.rows_per_draw)
        sources = np.repeat(draws.sources, self.rows_per_draw)
        positions = (
            draws.numbers[:, None] * self.rows_per_draw
            + np.arange(self.rows_per_draw, dtype=np.int64)
        ).reshape(-1)
        lanes = np.empty_like(positions)
        for number in np.unique(sources).tolist():
            here = sources == number
            lanes[here] = self.orders[number].lanes_of(positions[here])
        order = np.lexsort((positions, sources, lanes))
        return sources[order], positions[order]

    def _weights(
        self, size_exponent: float, reweightings: Sequence[Reweighting]
    ) -> list[tuple[int, list[float]]]:
        now = {
            source.name: float(records) ** size_exponent if source.weight is None else source.weight
            for source, records in zip(self.sources, self.source_records, strict=True)
        }
        intervals = [(0, list(now.values()))]
        for change in reweightings:
            now |= change.weights
            first_draw = change.from_step * self.global_batch // self.rows_per_draw
            if first_draw == 0:
                intervals.clear()
            intervals.append((first_draw, list(now.values())))
        return intervals

    def _max_draws(self) -> list[int | None]:
        return [
            None if source.epochs is None else int(source.epochs * records) // self.rows_per_draw
            for source, records in zip(self.sources, self.epoch_records.tolist(), strict=True)
        ]

    def _check_sizes(self, rows: IndexArray) -> None:
        for source, records, needed in zip(self.sources, self.source_records, rows, strict=True):
            if records < needed:
                of = f"{needed} rows of each batch" if self.mixed else "the rows of a batch"
                raise UserError(
                    f"global_batch={self.global_batch}: source {source.name!r} has {records} "
                    f"records, fewer than {of}; lower global_batch"
                    + (
                        f" or data.sources.{source.name}.weight"
                        if self.mixed
                        else ", add shards, or set data.batches=mixed"
                    )
                )
