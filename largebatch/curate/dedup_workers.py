"""What worker processes do for `dedup`: read segments, hash their records, compare texts."""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from largebatch.curate import minhash
from largebatch.curate.contamination import EvaluationIndex, NearSettings
from largebatch.curate.convert import extra_fields
from largebatch.curate.minhash import Bands, UInt64Array
from largebatch.curate.textfile import TextFile
from largebatch.data.tables import Row
from largebatch.errors import DataError
from largebatch.shards.fields import field_names
from largebatch.shards.index import Segment
from largebatch.shards.records import Record
from largebatch.shards.segment import SegmentRecords, read_segment

T = TypeVar("T")

SIDES = ("query", "document")


class Settings(NamedTuple):
    """What all workers need to know."""

    fields: Mapping[str, str]
    """Which field of a record is what."""
    near: NearSettings | None
    """What makes texts near duplicates; None: they are not looked for."""
    evaluation: Path | None
    """Folder with the index of the evaluation sets, if there are any."""

    @property
    def pair_bands(self) -> Bands:
        """How signatures of pairs are cut: each band has `num_rows` of either side's.

        Pairs agree in a row of both sides with the product of the sides' similarities.
        """
        assert self.near is not None
        return minhash.choose_bands(self.near.threshold**2, self.near.num_hashes)


class SourceSegment(NamedTuple):
    """A segment of a source."""

    source: int
    """Number of the source."""
    first: int
    """Number of its first record, over all sources."""
    url: str
    """Its shard."""
    shard_name: str
    """What that is called in the ids of records without one."""
    segment: Segment
    """Its place there."""


class Found(NamedTuple):
    """What a contaminated record holds."""

    evaluation_set: int
    """Number of the set."""
    way: str
    """One of `contamination.WAYS`."""
    side: str
    """query or document: which of the record's texts is meant."""
    similarity: float
    """As in `Match`."""
    evaluation_text: str
    """The set's query or passage."""


class Sketch(NamedTuple):
    """What is kept of the records of a segment to find duplicates."""

    first: int
    """Number of the first record."""
    exact: UInt64Array
    """`[n, 2]`, a hash of both sides' normalized texts."""
    sides: UInt64Array
    """`[2, n]`, a hash of each side's normalized text."""
    bands: UInt64Array
    """`[n, num_bands]`, keys of pairs; no columns without `near`."""
    empty: npt.NDArray[np.int64]
    """Rows whose query or document is empty."""
    contaminated: dict[int, Found]
    """Rows that hold an evaluation text, and which."""


class Workers:
    """Processes that each hold the settings; a context manager. One worker is this process."""

    def __init__(self, num_workers: int, settings: Settings) -> None:
        self._num_workers = num_workers
        self._settings = settings

    def __enter__(self) -> Self:
        self._pool = None
        if self._num_workers > 1:
            # Not forked: rensa's threads would not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._num_workers, context, initializer=_begin, initargs=(self._settings,)
            )
        else:
            _begin(self._settings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], T], tasks: Iterable[Any]) -> Iterator[T]:
        """Yield a function's results in the order of the tasks; few are under way at a time."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        waiting: deque[Future[T]] = deque()
        for task in tasks:
            waiting.append(self._pool.submit(function, task))
            if len(waiting) > 2 * self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def sketch(part: SourceSegment) -> Sketch:
    """Hash the records of a segment and look for evaluation texts in them.

    Raises DataError if the segment or one of its records can't be used, but for empty texts.
    """
    settings = _STATE.settings
    records = _read(part)
    texts: list[list[str]] = [[], []]
    empty = []
    for row in range(len(records)):
        try:
            record = records.record(row)
        except DataError as error:
            if error.kind != "empty":
                raise
            sides = "", ""
        else:
            sides = minhash.normalize(record.query), minhash.normalize(record.document)
        if not all(sides):
            empty.append(row)
        for side, text in zip(texts, sides, strict=True):
            side.append(text)
    exact = np.frombuffer(b"".join(map(_pair_digest, *texts)), np.uint64).reshape(-1, 2)
    each = np.frombuffer(b"".join(_digest(text, 8) for side in texts for text in side), np.uint64)
    words = minhash.hash_words(texts[0] + texts[1])
    num = len(records)
    signatures = None
    bands = np.empty((num, 0), np.uint64)
    if settings.near is not None:
        sets = minhash.ngrams(words, settings.near.ngram_words)
        signatures = minhash.sign(sets, settings.near.num_hashes)
        keys = minhash.band_keys(signatures, settings.pair_bands)
        bands = minhash.join_keys(keys[:num], keys[num:])
    contaminated = {}
    if _STATE.evaluation is not None:
        index = _STATE.evaluation
        found = index.find(texts[0] + texts[1], words, signatures)
        # Backwards, so that of a record's two texts the query, which comes first, stays.
        for place, match in sorted(found.items(), reverse=True):
            number = int(index.set_of[match.evaluation_text])
            text = index.texts[match.evaluation_text]
            contaminated[place % num] = Found(
                number, match.way, SIDES[place // num], match.similarity, text
            )
    for row in empty:
        contaminated.pop(row, None)
    return Sketch(
        part.first,
        exact,
        each.reshape(2, num),
        bands,
        np.array(empty, np.int64),
        dict(sorted(contaminated.items())),
    )


def normalized_texts(task: tuple[SourceSegment, list[int]]) -> list[str]:
    """Return the normalized query and document of some rows of a segment, one after another."""
    part, rows = task
    records = _read(part)
    texts = []
    for row in rows:
        record = records.record(row)
        texts += [minhash.normalize(record.query), minhash.normalize(record.document)]
    return texts


def compare(task: tuple[Path, npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    """Return the similarity of pairs `[m, 2]` of records in a file of `normalized_texts`.

    It is the smaller of both sides' Jaccard similarities.
    """
    path, pairs = task
    near = _STATE.settings.near
    assert near is not None
    texts = TextFile(path)
    values = np.empty(len(pairs))
    for place, (one, other) in enumerate(pairs.tolist()):
        value = minhash.similarity(texts[2 * one], texts[2 * other], near.ngram_words)
        if value >= near.threshold:
            document = minhash.similarity(
                texts[2 * one + 1], texts[2 * other + 1], near.ngram_words
            )
            value = min(value, document)
        values[place] = value
    return values


def full_records(task: tuple[SourceSegment, list[int]]) -> list[tuple[Record, dict[str, Any]]]:
    """Return some rows of a segment, each with what it holds beyond a record."""
    part, rows = task
    records = _read(part)
    found = []
    for row in rows:
        fields = Row(f"{part.url}, from byte {part.segment.offset}", records.mapping(row))
        names = field_names(fields.fields, fields=_STATE.settings.fields, where=fields.where)
        record = records.record(row)
        found.append((record, extra_fields(fields, names, record, uses_source=True)))
    return found


class _State(NamedTuple):
    settings: Settings
    evaluation: EvaluationIndex | None


def _begin(settings: Settings) -> None:
    global _STATE
    evaluation = None
    if settings.evaluation is not None:
        evaluation = EvaluationIndex(settings.evaluation, near=settings.near)
    _STATE = _State(settings, evaluation)


_STATE: _State


def _read(part: SourceSegment) -> SegmentRecords:
    # Without a name of the source, so that records keep the one that they bear.
    return read_segment(
        part.url,
        part.segment,
        fields=_STATE.settings.fields,
        source="",
        shard_name=part.shard_name,
    )


def _pair_digest(query: str, document: str) -> bytes:
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    return _digest(f"{len(query)} {query}{document}", 16)


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
