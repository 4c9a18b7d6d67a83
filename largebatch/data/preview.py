"""The rows of one global batch as training sees them: who reads each, and where texts are cut."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from largebatch.batch import SkippedRow
from largebatch.data.reader import Reader
from largebatch.data.source import Source
from largebatch.data.text import TextSettings
from largebatch.shards.records import Record
from largebatch.world import part_of_rank


class ShownText(NamedTuple):
    """One text as it goes to the tokenizer."""

    text: str
    """The text, its prompt before it."""
    prompt_chars: int
    """Length of the prompt."""
    num_tokens: int | None = None
    """Tokens of the whole text, special ones included; None if there is no tokenizer."""
    max_tokens: int | None = None
    """Most tokens that are used; None if there is no tokenizer."""
    kept_chars: tuple[int, int] | None = None
    """From which character to which the text is used, where the tokenizer tells."""

    @property
    def is_cut(self) -> bool:
        """Whether a part of it is not used, as far as that is known."""
        return self.num_tokens is not None and self.num_tokens > (self.max_tokens or 0)


class ShownRow(NamedTuple):
    """One row of a global batch."""

    row: int
    """Its number in the batch, from 0."""
    rank: int
    """The rank that it belongs to."""
    worker: int | None
    """The loader process of that rank that reads it; None: the rank itself."""
    source: str
    """Name of its source."""
    shard: str
    """Url of its shard."""
    segment: int
    """Number of its segment in the source."""
    record: int
    """Number of its record in the segment."""
    id: str
    """Of the record; empty where there is none."""
    query: ShownText | None
    """The query; None where the record has none, or can't be used, as the document."""
    document: ShownText | None
    """The document."""
    negatives: list[ShownText]
    """Those negatives that are used."""
    scores: list[float] | None
    """A teacher's scores of the document and of these negatives, where the objective learns from
    them."""
    label: float | None
    """What the pair's similarity is to follow, likewise."""
    skipped: SkippedRow | None
    """Why the row is empty, if it is."""


def read_batch(
    step: int,
    reader: Reader,
    *,
    text: TextSettings,
    tokenizer: Any | None,
    ranks: int,
    workers: int,
    known_skipped: Sequence[SkippedRow] = (),
) -> list[ShownRow]:
    """Return all rows of a step's batch, in order.

    Args:
        step: From 0, as in the schedule.
        reader: Skips faults, and knows `known_skipped`.
        text: Prompts and lengths of that step.
        tokenizer: Of the backbone, or None.
        ranks: Processes of the run.
        workers: Loader processes of each.
        known_skipped: What the run has noted as unusable.
    """
    num_rows = reader.schedule.global_batch
    found = reader.read(step, range(num_rows))
    places = reader.schedule.rows(step, range(num_rows))
    noted = {one.row: one for one in known_skipped if one.step == step}
    places_in_run = assign_rows(num_rows, ranks=ranks, workers=workers)
    shown = _show_records(found, reader.sources, text, tokenizer)
    rows = []
    for row, (rank, worker) in enumerate(places_in_run):
        source = reader.sources[int(places.sources[row])]
        segment, item = int(places.segments[row]), found[row]
        record = item if isinstance(item, Record) else None
        texts = shown.get(row, [])
        rows.append(
            ShownRow(
                row=row,
                rank=rank,
                worker=worker,
                source=source.name,
                shard=source.shard_of(segment),
                segment=segment,
                record=int(places.offsets[row]),
                id=record.id if record else "",
                query=texts[0] if texts and texts[0].text else None,
                document=texts[1] if texts else None,
                negatives=texts[2:],
                scores=source.used_texts(record, text).scores if record else None,
                label=record.label if record else None,
                skipped=None if isinstance(item, Record) else noted[row] if item is None else item,
            )
        )
    return rows


def assign_rows(num_rows: int, *, ranks: int, workers: int) -> list[tuple[int, int | None]]:
    """Return the rank and the loader process (None: the rank itself) that reads each row.

    >>> assign_rows(5, ranks=2, workers=2)
    [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]
    """
    return [
        (rank, worker if workers else None)
        for rank in range(ranks)
        for worker in range(max(workers, 1))
        for _ in part_of_rank(len(part_of_rank(num_rows, rank, ranks)), worker, max(workers, 1))
    ]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the tokens of each text before anything is cut, special ones included."""
    if not texts:
        return []
    # Not verbose: it would warn of texts beyond the model's length, which is what is asked for.
    encoded = tokenizer(
        list(texts),
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [len(tokens) for tokens in encoded["input_ids"]]


def _show_records(
    found: Sequence[Record | SkippedRow | None],
    sources: Sequence[Source],
    text: TextSettings,
    tokenizer: Any | None,
) -> dict[int, list[ShownText]]:
    """Return query, document and negatives of each row that holds a record."""
    by_name = {source.name: source for source in sources}
    texts: dict[int, list[ShownText]] = {}
    for row, record in enumerate(found):
        if isinstance(record, Record):
            source = by_name[record.source]
            query_prompt, document_prompt = source.prompts(text)
            used = source.used_texts(record, text)
            texts[row] = [ShownText(used.query, len(query_prompt) if used.query else 0)] + [
                ShownText(document, len(document_prompt))
                for document in (used.document, *used.negatives)
            ]
    if tokenizer is None:
        return texts
    limits = {True: text.query_max_tokens, False: text.document_max_tokens}
    for is_query, limit in limits.items():
        places = [(row, i) for row in texts for i in range(len(texts[row])) if (i == 0) == is_query]
        measured = _measure([texts[row][i] for row, i in places], tokenizer, limit)
        for (row, i), shown in zip(places, measured, strict=True):
            texts[row][i] = shown
    return texts


def _measure(shown: Sequence[ShownText], tokenizer: Any, max_tokens: int) -> list[ShownText]:
    counts = count_tokens(tokenizer, [one.text for one in shown])
    measured = [
        one._replace(num_tokens=count, max_tokens=max_tokens)
        for one, count in zip(shown, counts, strict=True)
    ]
    cut = [i for i, one in enumerate(measured) if one.is_cut]
    if not cut or not tokenizer.is_fast:  # One in pure Python tells no characters of a token.
        return measured
    encoded = tokenizer(
        [measured[i].text for i in cut],
        truncation=True,
        max_length=max_tokens,
        return_offsets_mapping=True,
        padding=False,
    )
    for i, offsets in zip(cut, encoded["offset_mapping"], strict=True):
        # Special tokens are of no characters.
        spans = [(begin, end) for begin, end in offsets if end > begin]
        kept = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        measured[i] = measured[i]._replace(kept_chars=kept)
    return measured


def as_json(row: ShownRow) -> Mapping[str, Any]:
    """Return a row for machines: texts as objects, and why it was skipped as kind and reason."""

    def entry(shown: ShownText | None) -> dict[str, Any] | None:
        return None if shown is None else {**shown._asdict(), "is_cut": shown.is_cut}

    return row._asdict() | {
        "query": entry(row.query),
        "document": entry(row.document),
        "negatives": [entry(negative) for negative in row.negatives],
        "skipped": row.skipped and {"kind": row.skipped.kind, "reason": row.skipped.reason},
    }
