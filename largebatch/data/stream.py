"""The stream: one rank's part of each global batch, read and tokenized ahead of the step."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from largebatch.batch import RankBatch, Texts
from largebatch.data.records import Record
from largebatch.data.schedule import Schedule
from largebatch.data.shards import Segment, Shard, read_segment
from largebatch.data.text import TextSettings, tokenize
from largebatch.errors import UserError
from largebatch.world import World, part_of_rank


class Source(NamedTuple):
    """One set of shards, resolved: every segment of it in a fixed order."""

    name: str
    urls: list[str]
    """`[S]`, the shard of each segment."""
    segments: list[Segment]
    """`[S]`."""
    fields: Mapping[str, str]
    """Names of the records' fields, as in `record_from_mapping`."""

    @classmethod
    def of_shards(
        cls, name: str, shards: Sequence[tuple[str, Shard]], fields: Mapping[str, str]
    ) -> "Source":
        """List the segments of shards."""
        places = [(url, segment) for url, shard in shards for segment in shard.segments]
        return cls(name, [url for url, _ in places], [segment for _, segment in places], fields)

    @property
    def segment_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return `[S]` records of each segment."""
        return np.array([segment.num_records for segment in self.segments], np.int64)

    def read(self, number: int) -> list[Record]:
        """Read the records of a segment."""
        return read_segment(
            self.urls[number], self.segments[number], fields=self.fields, source=self.name
        )


class Stream:
    """Batches of one rank, from any step on.

    Args:
        source: Where records come from.
        schedule: Which record is in which batch.
        tokenizer: Of the backbone.
        text: Prompts and lengths.
        world: Which part of each batch is this rank's.
        workers: Loader processes; 0 reads in this process.
        prefetch: Batches that each of them prepares ahead.
        max_chars: Longest text.
    """

    def __init__(
        self,
        source: Source,
        schedule: Schedule,
        *,
        tokenizer: Any,
        text: TextSettings,
        world: World,
        workers: int = 0,
        prefetch: int = 4,
        max_chars: int = 200_000,
    ) -> None:
        self.schedule = schedule
        self.workers = workers
        self.prefetch = prefetch
        rows = part_of_rank(schedule.global_batch, world.rank, world.size)
        self._reader = _Reader(source, schedule, tokenizer, text, rows, max_chars)

    def batches(self, first_step: int, stop_step: int) -> Iterator[RankBatch]:
        """Yield the batches of steps `first_step` to `stop_step - 1`.

        Raises:
            UserError: A shard or a record can't be used.
        """
        parts = DataLoader(
            _Parts(self._reader, range(first_step, stop_step)),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=_unchanged,
            # Its own generator: the loader must not draw from the one that dropout draws from.
            generator=torch.Generator(),
        )
        # Workers are asked in turn, and each gives its rows of every step.
        iterator = iter(parts)
        for _ in range(first_step, stop_step):
            yield _join([_checked(next(iterator)) for _ in range(max(self.workers, 1))])


SAMPLED_CHARS = 10_000
"""Characters of a text that a tokenizer is trained on."""


def sample_texts(source: Source, *, most_records: int, max_chars: int) -> Iterator[str]:
    """Yield the texts of up to about `most_records` records, from all over the source.

    Raises:
        UserError: A text is longer than `max_chars`, or a shard or a record can't be used.
    """
    sizes = source.segment_sizes
    every = max(1, round(int(sizes.sum()) / most_records))
    for number in range(0, len(sizes), every):
        for record in source.read(number):
            _check_length(record, max_chars)
            for text in (record.query, record.document, *record.negatives):
                # The trainer takes time that is quadratic in a word's length, and words of a
                # hundred thousand letters occur (encoded data).
                yield text[:SAMPLED_CHARS]


class _Reader:
    """Reads and tokenizes rows of a step."""

    def __init__(
        self,
        source: Source,
        schedule: Schedule,
        tokenizer: Any,
        text: TextSettings,
        rows: range,
        max_chars: int,
    ) -> None:
        self.source = source
        self.schedule = schedule
        self.tokenizer = tokenizer
        self.text = text
        self.rows = rows
        self.max_chars = max_chars
        self._segments: OrderedDict[int, list[Record]] = OrderedDict()

    def read(self, step: int, rows: range) -> RankBatch:
        place = self.schedule.rows(step, rows)
        needed = list(dict.fromkeys(place.segments.tolist()))
        records_of = {number: self._segment(number, len(needed)) for number in needed}
        records = [
            records_of[segment][offset]
            for segment, offset in zip(place.segments.tolist(), place.offsets.tolist(), strict=True)
        ]
        for record in records:
            _check_length(record, self.max_chars)
        sides = [
            ("query", [record.query for record in records]),
            ("document", [record.document for record in records]),
            ("document", [text for record in records for text in record.negatives]),
        ]
        tokenized = [
            tokenize(
                self.tokenizer,
                texts,
                prompt=self.text.prompt(side),
                max_tokens=self.text.max_tokens(side),
            )
            for side, texts in sides
        ]
        (queries, _), (documents, _), (negatives, _) = tokenized
        return RankBatch(
            step=step,
            ids=[record.id for record in records],
            queries=queries,
            documents=documents,
            negatives=negatives,
            num_truncated=sum(count for _, count in tokenized),
        )

    def _segment(self, number: int, num_needed: int) -> list[Record]:
        if number not in self._segments:
            self._segments[number] = self.source.read(number)
        self._segments.move_to_end(number)
        # A batch's segments, and those of the batch before, which may still have rows to give.
        while len(self._segments) > 2 * num_needed:
            self._segments.popitem(last=False)
        return self._segments[number]


class _Failure(NamedTuple):
    """A UserError on its way out of a loader process, which would wrap it in its traceback."""

    message: str


class _Parts(IterableDataset[RankBatch | _Failure]):
    """Each loader process's rows of every step."""

    def __init__(self, reader: _Reader, steps: range) -> None:
        self.reader = reader
        self.steps = steps

    def __iter__(self) -> Iterator[RankBatch | _Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        part = part_of_rank(len(self.reader.rows), worker, workers)
        rows = self.reader.rows[part.start : part.stop]
        try:
            for step in self.steps:
                yield self.reader.read(step, rows)
        except UserError as error:
            yield _Failure(str(error))


def _check_length(record: Record, max_chars: int) -> None:
    for text in (record.query, record.document, *record.negatives):
        if len(text) > max_chars:
            raise UserError(
                f"record {record.id!r} of source {record.source!r} has a text of {len(text):,} "
                f"characters, more than data.max_chars={max_chars}; shorten it, or raise the option"
            )


def _checked(part: RankBatch | _Failure) -> RankBatch:
    if isinstance(part, _Failure):
        raise UserError(part.message)
    return part


def _join(parts: list[RankBatch]) -> RankBatch:
    assert len({part.step for part in parts}) == 1
    if len(parts) == 1:
        return parts[0]
    return RankBatch(
        step=parts[0].step,
        ids=[record_id for part in parts for record_id in part.ids],
        queries=Texts.concatenate([part.queries for part in parts]),
        documents=Texts.concatenate([part.documents for part in parts]),
        negatives=Texts.concatenate([part.negatives for part in parts]),
        num_truncated=sum(part.num_truncated for part in parts),
    )


def _unchanged(part: Any) -> Any:
    return part
