"""The stream: one rank's part of each global batch, read and tokenized ahead of the step."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from largebatch.batch import RankBatch, Scores, SkippedRow, Texts
from largebatch.data.reader import Reader
from largebatch.data.source import Source
from largebatch.data.text import TextSettings, tokenize
from largebatch.errors import DataError, UserError
from largebatch.order.schedule import Schedule
from largebatch.shards.records import Record
from largebatch.shards.segment import SegmentRecords
from largebatch.world import World, part_of_rank


class TextChange(NamedTuple):
    """Prompts and lengths from a step on."""

    from_step: int
    """First step that they hold for."""
    text: TextSettings
    """The settings."""


def text_at(phases: Sequence[TextChange], step: int) -> TextSettings:
    """Return the prompts and lengths of a step, from 0."""
    return [phase.text for phase in phases if phase.from_step <= step][-1]


class Stream:
    """Batches of one rank, from any step on.

    Args:
        sources: Where records come from, in the schedule's order.
        schedule: Which record is in which batch.
        tokenizer: Of the backbone.
        text: Prompts and lengths; or how they change, by rising steps, the first one 0.
        world: Which part of each batch is this rank's.
        workers: Loader processes; 0 reads in this process.
        prefetch: Batches that each of them prepares ahead.
        buffer_bytes: Memory of each for segments that may be needed again.
        skip_faults: Whether records that can't be used are left out; otherwise they are an error.
        known_skipped: Rows by step that are left out whatever is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        schedule: Schedule,
        *,
        tokenizer: Any,
        text: TextSettings | Sequence[TextChange],
        world: World,
        workers: int = 0,
        prefetch: int = 4,
        buffer_bytes: int = 2**30,
        skip_faults: bool = False,
        known_skipped: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.workers = workers
        self.prefetch = prefetch
        self._make = _BatchMaker(
            Reader(
                sources,
                schedule,
                buffer_bytes=buffer_bytes,
                skip_faults=skip_faults,
                known_skipped=known_skipped,
            ),
            tokenizer,
            [TextChange(0, text)] if isinstance(text, TextSettings) else text,
            part_of_rank(schedule.global_batch, world.rank, world.size),
        )

    def batches(self, first_step: int, stop_step: int) -> Iterator[RankBatch]:
        """Yield the batches of steps `first_step` to `stop_step - 1`.

        Raises:
            UserError: A shard or a record can't be used.
        """
        with warnings.catch_warnings():
            # data.workers is the user's choice; each rank would warn that there are fewer cores.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            parts = DataLoader(
                _Parts(self._make, range(first_step, stop_step)),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                collate_fn=_unchanged,
                worker_init_fn=_begin_worker,
                # Its own generator: the loader must not draw from the one that dropout draws from.
                generator=torch.Generator(),
            )
            iterator = iter(parts)
        # Workers are asked in turn, and each gives its rows of every step.
        for _ in range(first_step, stop_step):
            yield _join([_checked(next(iterator)) for _ in range(max(self.workers, 1))])


SAMPLED_CHARS = 10_000
"""Characters of a text that a tokenizer is trained on."""


def sample_texts(
    sources: Sequence[Source], shares: Sequence[float], *, max_records: int, skip_faults: bool
) -> Iterator[str]:
    """Yield texts of up to about `max_records` records, of each source by its share.

    They come from segments all over the source.

    Raises:
        DataError: A shard or a record can't be used, and faults are not skipped.
    """
    for source, share in zip(sources, shares, strict=True):
        if share == 0:
            continue
        sizes = source.segment_sizes
        every = max(1, round(int(sizes.sum()) / (max_records * share)))
        for number in range(0, len(sizes), every):
            try:
                segment = source.read(number)
            except DataError as error:
                if not skip_faults:
                    raise
                if error.kind == "unreachable":
                    break  # the store would be waited for at each of its segments
                continue
            for record in usable_records(segment, skip_faults=skip_faults):
                for text in filter(None, (record.query, record.document, *record.negatives)):
                    # The trainer takes time that is quadratic in a word's length, and words of a
                    # hundred thousand letters occur (encoded data).
                    yield text[:SAMPLED_CHARS]


def usable_records(segment: SegmentRecords, *, skip_faults: bool) -> Iterator[Record]:
    """Yield the records of a segment; those that can't be used are an error or passed over."""
    for number in range(len(segment)):
        try:
            yield segment.record(number)
        except DataError:
            if not skip_faults:
                raise


class _BatchMaker:
    """Reads and tokenizes rows of a step."""

    def __init__(
        self, reader: Reader, tokenizer: Any, text_changes: Sequence[TextChange], rows: range
    ) -> None:
        assert text_changes[0].from_step == 0
        self.reader = reader
        self.tokenizer = tokenizer
        self.text_changes = text_changes
        self.rows = rows

    def batch(self, step: int, rows: range) -> RankBatch:
        found = self.reader.read(step, rows)
        usable = [i for i, record in enumerate(found) if isinstance(record, Record)]
        records = [record for record in found if isinstance(record, Record)]
        sources = self.reader.sources
        by_name = {source.name: source for source in sources}
        source_of = [by_name[record.source] for record in records]
        text = text_at(self.text_changes, step)
        used = [
            source.used_texts(record, text)
            for source, record in zip(source_of, records, strict=True)
        ]
        queries, cut_queries = self._tokenize([one.query for one in used], text.query_max_tokens)
        documents, cut_documents = self._tokenize(
            [one.document for one in used], text.document_max_tokens
        )
        negatives, cut_negatives = self._tokenize(
            [negative for one in used for negative in one.negatives], text.document_max_tokens
        )
        ids = [f"{record.source}/{record.id}" for record in records]
        place = self.reader.schedule.rows(step, rows)
        # Of the schedule, not of the rows: a rank whose rows are all skipped must know it too.
        number = self.reader.schedule.source_of(step)
        same_ids = None
        if any(
            source.mask_same_id for source in (sources if number is None else [sources[number]])
        ):
            # Other records' ids have a slash in them, so that none is taken for a row.
            same_ids = [
                name if source.mask_same_id else f"row {rows[i]}"
                for name, source, i in zip(ids, source_of, usable, strict=True)
            ]
        return RankBatch(
            step=step,
            ids=ids,
            queries=queries,
            documents=documents,
            negatives=negatives,
            negative_counts=np.array([len(one.negatives) for one in used], np.int32),
            num_truncated=cut_queries + cut_documents + cut_negatives,
            loss_options=sources[0 if number is None else number].loss,
            same_ids=same_ids,
            scores=Scores.of_records([one.scores or [] for one in used])
            if "scores" in sources[0].needs
            else None,
            labels=np.array([record.label for record in records], np.float64)
            if "label" in sources[0].needs
            else None,
            places=[(int(place.segments[i]), int(place.offsets[i])) for i in usable],
            num_skipped=len(found) - len(records),
            newly_skipped=[one for one in found if isinstance(one, SkippedRow)],
        )

    def _tokenize(self, texts: list[str], max_tokens: int) -> tuple[Texts, int]:
        """Return the tokens of texts, and how many were cut; an empty text has none."""
        some = [text for text in texts if text]
        tokens, num_truncated = tokenize(self.tokenizer, some, prompt="", max_tokens=max_tokens)
        if len(some) < len(texts):
            lengths = np.zeros(len(texts), np.int32)
            lengths[[bool(text) for text in texts]] = tokens.lengths
            tokens = tokens._replace(lengths=lengths)
        return tokens, num_truncated


class _Failure(NamedTuple):
    """A UserError on its way out of a loader process, which would wrap it in its traceback."""

    message: str


class _Parts(IterableDataset[RankBatch | _Failure]):
    """Each loader process's rows of every step."""

    def __init__(self, maker: _BatchMaker, steps: range) -> None:
        self.maker = maker
        self.steps = steps

    def __iter__(self) -> Iterator[RankBatch | _Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        part = part_of_rank(len(self.maker.rows), worker, workers)
        rows = self.maker.rows[part.start : part.stop]
        try:
            for step in self.steps:
                yield self.maker.batch(step, rows)
        except UserError as error:
            yield _Failure(str(error))


def _begin_worker(_worker: int) -> None:
    # The pool of threads of `tokenizers` did not survive the fork: whoever uses it waits for ever,
    # whatever a job script says.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _end_with_rank()


def _end_with_rank() -> None:
    """Make this loader process end when the process that started it does, even by SIGKILL.

    torch looks after that only between two batches: a process whose batch nobody takes any more
    would stay for ever, and with it the lock on the run folder, which it inherited.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def wait() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
        negative_counts=np.concatenate([part.negative_counts for part in parts]),
        num_truncated=sum(part.num_truncated for part in parts),
        loss_options=parts[0].loss_options,
        same_ids=None
        if parts[0].same_ids is None
        else [name for part in parts for name in part.same_ids or ()],
        scores=None
        if parts[0].scores is None
        else Scores.concatenate([part.scores for part in parts if part.scores is not None]),
        labels=None
        if parts[0].labels is None
        else np.concatenate([part.labels for part in parts if part.labels is not None]),
        places=[place for part in parts for place in part.places],
        num_skipped=sum(part.num_skipped for part in parts),
        newly_skipped=[one for part in parts for one in part.newly_skipped],
    )


def _unchanged(part: Any) -> Any:
    return part
