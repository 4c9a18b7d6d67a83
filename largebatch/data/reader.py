"""The reader: records of a batch's rows, from segments kept while they have more to give."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

from largebatch.batch import SkippedRow
from largebatch.data.source import Source
from largebatch.errors import DataError
from largebatch.order.schedule import Schedule
from largebatch.shards.records import Record
from largebatch.shards.segment import SegmentRecords
from largebatch.stores.locations import is_remote

REMOTE_READS = 8
"""Segments of a remote store that are read at once."""
_FAILURE_BYTES = 1024


class Reader:
    """Reads rows of global batches.

    Args:
        sources: Where records come from, in the schedule's order.
        schedule: Which record is in which row.
        buffer_bytes: Memory for segments that were read and may be needed again.
        skip_faults: Whether a row that can't be used is skipped; otherwise it is an error.
        known_skipped: Rows by step that are skipped whatever is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        schedule: Schedule,
        *,
        buffer_bytes: int = 2**30,
        skip_faults: bool = False,
        known_skipped: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self.sources = sources
        self.schedule = schedule
        self.skip_faults = skip_faults
        self._known_skipped = known_skipped or {}
        self._segments = _Buffer(buffer_bytes)
        # Sources whose store did not answer, for all retries. Their next segments are tried once
        # only, until one answers: the other ranks wait for this one no longer than their timeout.
        self._silent: set[int] = set()

    def read(self, step: int, rows: range) -> list[Record | SkippedRow | None]:
        """Return the records of some rows of a step; a newly skipped row, or None for a known one.

        Raises:
            DataError: A record can't be used, and faults are not skipped.
        """
        place = self.schedule.rows(step, rows)
        known = self._known_skipped.get(step, ())
        wanted = [
            None if row in known else (source, segment, offset)
            for row, source, segment, offset in zip(
                rows,
                place.sources.tolist(),
                place.segments.tolist(),
                place.offsets.tolist(),
                strict=True,
            )
        ]
        segments = self._load(dict.fromkeys((w[0], w[1]) for w in wanted if w is not None))
        return [
            None if w is None else self._record(segments[w[0], w[1]], w[0], w[2], step, row)
            for row, w in zip(rows, wanted, strict=True)
        ]

    def _record(
        self, segment: SegmentRecords | DataError, source: int, offset: int, step: int, row: int
    ) -> Record | SkippedRow:
        try:
            if isinstance(segment, DataError):
                raise segment
            return segment.record(offset)
        except DataError as error:
            if not self.skip_faults:
                raise _with_cure(error) from None
            return SkippedRow(step, row, self.sources[source].name, error.kind, str(error))

    def _load(
        self, needed: Collection[tuple[int, int]]
    ) -> dict[tuple[int, int], SegmentRecords | DataError]:
        found = {place: self._segments.get(place) for place in needed}
        absent = [place for place, segment in found.items() if segment is None]
        remote = [place for place in absent if is_remote(self.sources[place[0]].shard_of(place[1]))]
        if len(remote) > 1:
            # The first batch asks for a segment of every lane, and a store answers slowly.
            # Those that begin together are all tried in full, whichever of them fails first.
            silent = [frozenset(self._silent)] * REMOTE_READS
            with ThreadPoolExecutor(REMOTE_READS) as pool:
                read = pool.map(self._read, remote, chain(silent, repeat(self._silent)))
                found |= zip(remote, read, strict=True)
        for place in absent:
            segment = found[place]
            if segment is None:
                segment = found[place] = self._read(place, self._silent)
            self._segments.put(place, segment)
        return {place: segment for place, segment in found.items() if segment is not None}

    def _read(self, place: tuple[int, int], silent: Collection[int]) -> SegmentRecords | DataError:
        number, segment = place
        source = self.sources[number]
        if number in silent:
            source = source._replace(retries=source.retries._replace(attempts=1))
        try:
            found = source.read(segment)
        except DataError as error:
            if error.kind == "unreachable":
                self._silent.add(number)
            if not self.skip_faults:
                raise _with_cure(error) from None
            # Kept like a segment: each of its rows would wait for all the retries again.
            return error
        self._silent.discard(number)
        return found


class _Buffer:
    """Keeps the segments that were used last, up to a size."""

    def __init__(self, max_bytes: int) -> None:
        self._most_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[tuple[int, int], SegmentRecords | DataError] = OrderedDict()

    def get(self, place: tuple[int, int]) -> SegmentRecords | DataError | None:
        if place in self._kept:
            self._kept.move_to_end(place)
        return self._kept.get(place)

    def put(self, place: tuple[int, int], segment: SegmentRecords | DataError) -> None:
        self._kept[place] = segment
        self._num_bytes += _size(segment)
        while self._num_bytes > self._most_bytes and len(self._kept) > 1:
            self._num_bytes -= _size(self._kept.popitem(last=False)[1])


def _with_cure(error: DataError) -> DataError:
    # A run that was stopped by it may go on with this option changed.
    return DataError(f"{error} (data.on_fault=skip would go on without it)", kind=error.kind)


def _size(segment: SegmentRecords | DataError) -> int:
    return _FAILURE_BYTES if isinstance(segment, DataError) else segment.num_bytes
