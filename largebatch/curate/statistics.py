"""What sources hold: counts, lengths, duplicates and what can't be used, of a sample or all of it.

Nothing here stops at a record or a segment that can't be used: those are what is counted.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.data.preview import count_tokens
from largebatch.data.source import Source
from largebatch.data.text import TextSettings
from largebatch.errors import DataError
from largebatch.order.schedule import Schedule
from largebatch.shards.ids import IdCounter, RepeatedIds
from largebatch.shards.records import Record

SIDES = ("query", "document", "negative")
KINDS_OF_DUPLICATES = ("pair", "query", "document")
MIN_SEGMENTS = 32
"""Segments that a sample is taken from at least, for neighbours are often alike."""

Lengths = dict[str, npt.NDArray[np.int32]]


class SourceSample(NamedTuple):
    """What was found in the records of a source that were looked into."""

    name: str
    """Name of the source."""
    num_sampled: int
    """Records that were looked into."""
    num_usable: int
    """Those of them that training can use."""
    unusable: dict[str, int]
    """The others, by kind: see `errors.FAULT_KINDS`."""
    reasons: dict[str, str]
    """What is wrong with the first of each kind, and where."""
    num_with_negatives: int
    """Usable records with a negative that is used."""
    chars: Lengths
    """Characters of each used text, prompts included, by side."""
    tokens: Lengths | None
    """Tokens of each before it is cut, special ones included; None without a tokenizer."""
    keys: dict[str, npt.NDArray[np.uint64]]
    """`[num_usable]` hashes of the pair, the query and the document of each record; fewer queries,
    where records are texts without one."""
    examples: list[Record]
    """A few records from all over the sample."""
    repeated_ids: RepeatedIds = RepeatedIds()
    """Ids that several of the usable records carry."""


class Duplicates(NamedTuple):
    """Exact duplicates among the sampled records of all sources: of pairs, queries or documents."""

    within: dict[str, int]
    """Records of a source that repeat an earlier one of it."""
    across: dict[str, int]
    """Records of a source that another source has too."""
    shared: dict[str, dict[str, int]]
    """The latter by the other source, where there are any."""


class SourceShare(NamedTuple):
    """A source's part of a run; what only batches decide is None where there are none."""

    name: str
    """Name of the source."""
    num_shards: int
    num_segments: int
    num_records: int
    num_bytes: int
    """Of its segments, as they are stored."""
    wanted: float | None
    """Share of the run that the weights ask for."""
    realized: float | None
    """Share of the run's rows that it gives."""
    epochs: float | None
    """How often the run goes through it."""
    left_out: int | None
    """Records that each epoch leaves out, for they fill no batch."""


def source_shares(
    sources: Sequence[Source], schedule: Schedule | None, num_steps: int
) -> list[SourceShare]:
    """Return what each source is to a run of so many steps."""
    parts: list[dict[str, Any]] = [
        dict.fromkeys(("wanted", "realized", "epochs", "left_out")) for _ in sources
    ]
    if schedule is not None:
        given = schedule.rows_given(num_steps)
        columns = {
            "wanted": _mean_shares(schedule, num_steps),
            "realized": given / given.sum(),
            "epochs": schedule.epochs(num_steps),
            "left_out": schedule.left_out(),
        }
        for number, part in enumerate(parts):
            part.update({name: column[number].item() for name, column in columns.items()})
    return [
        SourceShare(
            name=source.name,
            num_shards=len(source.shards),
            num_segments=len(source.segments),
            num_records=int(source.segment_sizes.sum()),
            num_bytes=int(source.segments.num_bytes.sum()),
            **part,
        )
        for source, part in zip(sources, parts, strict=True)
    ]


def sample_source(
    source: Source,
    *,
    max_records: int,
    text: TextSettings,
    tokenizer: Any | None,
    num_examples: int = 0,
    on_segment: Callable[[int], None] = lambda _: None,
) -> SourceSample:
    """Look into records from all over a source.

    Args:
        source: Where they are.
        max_records: About how many; 0: all.
        text: Prompts, and what a source's own settings leave to the run.
        tokenizer: Of the backbone, or None.
        num_examples: How many records are kept whole.
        on_segment: Called with the bytes of each segment that was read.
    """
    unusable: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    # Arrays, not lists: all of a source may be a hundred million records.
    chars = {side: array("i") for side in SIDES}
    tokens = {side: array("i") for side in SIDES}
    keys = {kind: array("Q") for kind in KINDS_OF_DUPLICATES}
    examples: list[Record] = []
    ids = IdCounter()
    num_with_negatives = 0
    plan = choose_records(source.segment_sizes, max_records)
    examples_of = Counter(i * len(plan) // num_examples for i in range(num_examples))
    for place, (number, offsets) in enumerate(plan):
        records = []
        for found in _read(source, number, offsets):
            if isinstance(found, Record):
                records.append(found)
            else:
                unusable[found.kind] += 1
                reasons.setdefault(found.kind, str(found))
        texts = _texts(records, source, text)
        for side in SIDES:
            chars[side].extend(map(len, texts[side]))
            if tokenizer is not None:
                tokens[side].extend(count_tokens(tokenizer, texts[side]))
        for record in records:
            keys["pair"].append(_hash(record.query, record.document))
            if record.query:
                keys["query"].append(_hash(record.query))
            keys["document"].append(_hash(record.document))
            ids.add(record.id)
            num_with_negatives += bool(record.negatives[: source.max_negatives])
        examples += records[: examples_of[place]]
        on_segment(int(source.segments.num_bytes[number]))
    return SourceSample(
        name=source.name,
        num_sampled=sum(len(offsets) for _, offsets in plan),
        num_usable=len(keys["pair"]),
        unusable=dict(unusable.most_common()),
        reasons=reasons,
        num_with_negatives=num_with_negatives,
        chars={side: np.array(chars[side], np.int32) for side in SIDES},
        tokens=None
        if tokenizer is None
        else {side: np.array(tokens[side], np.int32) for side in SIDES},
        keys={kind: np.array(keys[kind], np.uint64) for kind in KINDS_OF_DUPLICATES},
        examples=examples,
        repeated_ids=ids.repeated(),
    )


def choose_records(
    segment_sizes: npt.NDArray[Any], max_records: int
) -> list[tuple[int, Sequence[int]]]:
    """Return segments, and which of their records, spread evenly over a source; 0: all of them."""
    sizes = np.asarray(segment_sizes, np.int64)
    total = int(sizes.sum())
    if max_records == 0 or total <= max_records:
        return [(number, range(size)) for number, size in enumerate(sizes.tolist())]
    wanted = max(MIN_SEGMENTS, -(-max_records * len(sizes) // total))
    num_segments = min(wanted, len(sizes))
    chosen = np.arange(num_segments) * len(sizes) // num_segments
    ends = np.cumsum(sizes[chosen])
    num_records = min(max_records, int(ends[-1]))
    positions = np.arange(num_records) * int(ends[-1]) // num_records
    segments = np.searchsorted(ends, positions, side="right")
    offsets = positions - (ends - sizes[chosen])[segments]
    return [
        (int(chosen[i]), offsets[segments == i].tolist())
        for i in range(num_segments)
        if (segments == i).any()
    ]


def find_duplicates(samples: Sequence[SourceSample], kind: str) -> Duplicates:
    """Count the exact duplicates of a kind: pair, query or document."""
    uniques = {sample.name: np.unique(sample.keys[kind]) for sample in samples}
    within = {s.name: len(s.keys[kind]) - len(uniques[s.name]) for s in samples}
    across: dict[str, int] = {}
    shared: dict[str, dict[str, int]] = {}
    for sample in samples:
        keys = sample.keys[kind]
        elsewhere = np.zeros(len(keys), np.bool_)
        for other, others in uniques.items():
            if other != sample.name:
                here = np.isin(keys, others)
                elsewhere |= here
                if here.any():
                    shared.setdefault(sample.name, {})[other] = int(here.sum())
        across[sample.name] = int(elsewhere.sum())
    return Duplicates(within, across, shared)


def share_above(lengths: npt.NDArray[Any], limit: int) -> float:
    """Return the share of lengths that are above a limit; 0 if there are none."""
    return float((lengths > limit).mean()) if len(lengths) else 0.0


def percentiles(lengths: npt.NDArray[Any]) -> dict[str, float]:
    """Return how lengths are spread; empty if there are none."""
    if not len(lengths):
        return {}
    names = {"min": 0, "p5": 5, "median": 50, "p95": 95, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values()))
    return {"mean": float(lengths.mean())} | dict(zip(names, values.tolist(), strict=True))


def _mean_shares(schedule: Schedule, num_steps: int) -> npt.NDArray[np.float64]:
    """Return `[S]` the share that each source should have, averaged over the run's intervals."""
    draws = num_steps * schedule.global_batch // schedule.rows_per_draw
    intervals = schedule.mixture.intervals
    begins = [min(interval.first_draw, draws) for interval in intervals]
    sizes = np.diff([*begins, draws])
    return np.average([interval.shares for interval in intervals], axis=0, weights=sizes)


def _read(source: Source, number: int, offsets: Sequence[int]) -> Iterator[Record | DataError]:
    """Yield each record, or what is wrong with it; of a segment that can't be read, the latter."""
    try:
        segment = source.read(number)
    except DataError as error:
        for _ in offsets:
            yield error
        return
    for offset in offsets:
        try:
            yield segment.record(offset)
        except DataError as error:
            yield error


def _texts(
    records: Sequence[Record], source: Source, text: TextSettings
) -> Mapping[str, list[str]]:
    query_prompt, document_prompt = source.prompts(text)
    return {
        "query": [query_prompt + record.query for record in records if record.query],
        "document": [document_prompt + record.document for record in records],
        "negative": [
            document_prompt + negative
            for record in records
            for negative in record.negatives[: source.max_negatives]
        ],
    }


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")
