"""A source: one set of shards, every segment of it in a fixed order."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from largebatch.config.data import LossOptions
from largebatch.data.text import TextSettings
from largebatch.shards.find import shard_names
from largebatch.shards.index import SegmentTable, Shard
from largebatch.shards.records import Record
from largebatch.shards.segment import SegmentRecords, read_segment
from largebatch.stores.retries import DEFAULT_RETRIES, Retries

IndexArray = npt.NDArray[np.int64]


class UsedTexts(NamedTuple):
    """The texts of a record as they go to the tokenizer."""

    query: str
    document: str
    negatives: list[str]
    scores: list[float] | None
    """A teacher's, of the document and of each of these negatives."""


class Source(NamedTuple):
    """Where the records of a source are, and how they are used."""

    name: str
    """Its name in the config."""
    shards: list[str]
    """Urls of its shards."""
    shard_of_segment: IndexArray
    """`[S]`, number of each segment's shard."""
    segments: SegmentTable
    """`[S]`, where each lies in its shard."""
    fields: Mapping[str, str]
    """Names of the records' fields, as in `record_from_mapping`."""
    query_prompt: str | None = None
    """Put before its queries; None: the model's own prompt."""
    document_prompt: str | None = None
    """Put before its documents and negatives; None: the model's own prompt."""
    max_negatives: int | None = None
    """Most negatives of a record that are used."""
    loss: LossOptions = LossOptions()
    """What it asks of the objective."""
    mask_same_id: bool = False
    """Whether records with the same id answer the same query."""
    max_chars: int | None = None
    """Longest text that is no fault."""
    needs: Sequence[str] = ()
    """What every record must have beside its texts: scores, label."""
    retries: Retries = DEFAULT_RETRIES
    """How often a remote read is tried."""
    shard_names: Sequence[str] = ()
    """What its shards are called in the ids of records without one."""
    shards_hold_texts: Sequence[bool] = ()
    """Which of its shards hold texts without queries; empty: none."""

    @classmethod
    def of_shards(
        cls,
        name: str,
        shards: Sequence[tuple[str, Shard]],
        fields: Mapping[str, str],
        **options: Any,
    ) -> Self:
        """List the segments of shards; `options` are further fields of the source."""
        tables = [shard.segments for _, shard in shards]
        return cls(
            name,
            [url for url, _ in shards],
            np.repeat(np.arange(len(tables)), np.array([len(table) for table in tables], np.int64)),
            SegmentTable.concatenate(tables),
            fields,
            shard_names=shard_names(shards),
            shards_hold_texts=[shard.holds_texts for _, shard in shards],
            **options,
        )

    @property
    def segment_sizes(self) -> IndexArray:
        """Return `[S]` records of each segment."""
        return self.segments.num_records

    @property
    def holds_texts(self) -> bool:
        """Whether some of its records are texts without queries."""
        return any(self.shards_hold_texts)

    def shard_of(self, number: int) -> str:
        """Return the url of a segment's shard."""
        return self.shards[int(self.shard_of_segment[number])]

    def read(self, number: int) -> SegmentRecords:
        """Read a segment.

        Raises:
            DataError: Nothing in it can be used.
        """
        shard = int(self.shard_of_segment[number])
        return read_segment(
            self.shards[shard],
            self.segments[number],
            fields=self.fields,
            source=self.name,
            shard_name=self.shard_names[shard],
            max_chars=self.max_chars,
            needs=self.needs,
            texts=shard < len(self.shards_hold_texts) and self.shards_hold_texts[shard],
            retries=self.retries,
        )

    def prompts(self, text: TextSettings) -> tuple[str, str]:
        """Return what is put before its queries and before its documents; `text` has defaults."""
        query, document = self.query_prompt, self.document_prompt
        return (
            text.query_prompt if query is None else query,
            text.document_prompt if document is None else document,
        )

    def used_texts(self, record: Record, text: TextSettings) -> UsedTexts:
        """Return the texts of a record that a run uses, each with its prompt before it.

        The query of a text that has none stays empty.
        """
        query_prompt, document_prompt = self.prompts(text)
        negatives = [document_prompt + one for one in record.negatives[: self.max_negatives]]
        return UsedTexts(
            query_prompt + record.query if record.query else "",
            document_prompt + record.document,
            negatives,
            None if record.scores is None else record.scores[: 1 + len(negatives)],
        )

    def fingerprint(self) -> str:
        """Return a hash of what its index says, without the places where the shards lie."""
        digest = hashlib.sha256(self.name.encode())
        for shard in self.shards:
            digest.update(f"{shard.rpartition('/')[2]}\n".encode())
        digest.update(self.shard_of_segment.astype("<i8").tobytes())
        for column in (
            self.segments.offsets,
            self.segments.num_bytes,
            self.segments.num_records,
            self.segments.crc32,
        ):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()
