"""What flows through a training step: ragged token lists, one rank's batch, one padded chunk."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from largebatch.config.data import LossOptions

IntArray = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Texts(NamedTuple):
    """Tokenized texts of different lengths, without padding."""

    tokens: IntArray
    """`[sum of lengths]`, the token ids of all texts, one text after another."""
    lengths: IntArray
    """`[n]`, the number of tokens of each text."""

    @classmethod
    def from_lists(cls, token_lists: Sequence[Sequence[int]]) -> "Texts":
        """Pack one list of token ids per text."""
        lengths = np.fromiter((len(t) for t in token_lists), np.int32, len(token_lists))
        flat = [token for tokens in token_lists for token in tokens]
        return cls(np.asarray(flat, dtype=np.int32), lengths)

    @classmethod
    def concatenate(cls, parts: Sequence["Texts"]) -> "Texts":
        """Join several packs, in order."""
        if not parts:
            return cls(np.empty(0, np.int32), np.empty(0, np.int32))
        return cls(
            np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts])
        )

    @property
    def num_texts(self) -> int:
        """How many texts there are."""
        return len(self.lengths)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """`[n]`, where each text begins in `tokens`."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def take(self, rows: npt.NDArray[Any]) -> "Texts":
        """Return some of the texts, in the order of `rows`."""
        return Texts(self.tokens[self.token_places(rows)], self.lengths[rows])

    def token_places(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return where the tokens of some texts lie in `tokens`, one text after another."""
        lengths = self.lengths[rows]
        begin = np.cumsum(lengths, dtype=np.int64) - lengths
        return np.repeat(self.starts[rows] - begin, lengths) + np.arange(int(lengths.sum()))


class Scores(NamedTuple):
    """A teacher's scores of documents and of negatives, for the queries that they belong to."""

    documents: Float64Array
    """`[b]`, of each query's document."""
    negatives: Float64Array
    """`[n]`, of each negative for its own query."""

    @classmethod
    def of_records(cls, lists: Sequence[Sequence[float]]) -> "Scores":
        """Join those of records: the document's, then each negative's.

        >>> Scores.of_records([[5.0, 1.0, 2.0], [4.0]])
        Scores(documents=array([5., 4.]), negatives=array([1., 2.]))
        """
        negatives = [score for scores in lists for score in scores[1:]]
        documents = [scores[0] for scores in lists]
        return cls(np.array(documents, np.float64), np.array(negatives, np.float64))

    @classmethod
    def concatenate(cls, parts: Sequence["Scores"]) -> "Scores":
        """Join several, in order."""
        return cls(
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.negatives for part in parts]),
        )


class SkippedRow(NamedTuple):
    """One row of a global batch that is left out, since its record can't be used."""

    step: int
    """Step of the batch, from 0."""
    row: int
    """Row of the global batch."""
    source: str
    """Name of the source."""
    kind: str
    """One of `errors.FAULT_KINDS`."""
    reason: str
    """What is wrong, and where."""


class RankBatch(NamedTuple):
    """One rank's part of a global batch. Row `i` of queries and of documents is one pair."""

    queries: Texts
    """`b` texts."""
    documents: Texts
    """`b` texts, each the positive of the query in the same row."""
    negatives: Texts
    """`n` texts (any number)."""
    negative_counts: IntArray | None = None
    """`[b]`, how many of the negatives are each query's own, in the queries' order. None, on all
    ranks: they are nobody's own."""
    same_ids: Sequence[str] | None = None
    """`[b]`, equal where records answer the same query. None, on all ranks: nobody says so."""
    scores: Scores | None = None
    """A teacher's, with `negative_counts`. None, on all ranks: no objective needs them."""
    labels: Float64Array | None = None
    """`[b]`, what the similarity of each pair is to follow. None, on all ranks: no objective needs
    them."""
    loss_options: LossOptions = LossOptions()
    """What the batch's source asks of the objective, the same on all ranks."""
    step: int = 0
    """Number of the optimizer step that this batch is for, from 0."""
    ids: Sequence[str] = ()
    """`[b]`, the ids of the records, each with its source before it: `source/id`. They may repeat:
    what tells records apart is their place."""
    places: Sequence[tuple[int, int]] = ()
    """`b` pairs: the segment of the source that a record is in, and its number there."""
    num_truncated: int = 0
    """How many texts were cut at their side's maximum number of tokens."""
    num_skipped: int = 0
    """Rows of this rank's part that are missing, since their records can't be used."""
    newly_skipped: Sequence[SkippedRow] = ()
    """Those of them that no earlier process of the run has noted."""


class LengthGroup(NamedTuple):
    """Texts of one length that lie side by side in a packed chunk."""

    num_texts: int
    length: int
    """Tokens of each."""


class Packing(NamedTuple):
    """Where the n texts of a packed chunk lie in its one row of T tokens."""

    position_ids: Tensor
    """`[1, T]` int64, counted from each text's beginning."""
    boundaries: Tensor
    """`[n + 1]` int32, where each text begins, and T."""
    groups: tuple[LengthGroup, ...]
    """The texts' lengths, longest first, on the host."""


class Chunk(NamedTuple):
    """Texts that go through the encoder together, padded to one length or packed in one row."""

    input_ids: Tensor
    """`[n, L]` int64, or `[1, T]` where packed."""
    attention_mask: Tensor
    """Of the same shape, int64, 1 for tokens and 0 for padding."""
    packing: Packing | None = None
    """None: the texts are padded."""
    padded: bool = True
    """Whether there may be padding. Known on the host, so that nobody must ask the device."""

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return self.input_ids.numel()
