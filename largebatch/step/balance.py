"""Balance: ranks exchange pairs, so that none has more tokens to embed than the others.

Ranks have equally many pairs, not equally many tokens, and all of them wait for the one that has
most: the fewer pairs a rank has, the longer (benchmarks/results/balance.md). Whose a pair is does
not matter to the gradient: the loss is a sum over the rows of all ranks, each against the columns
of all ranks. A few pairs are enough to even the ranks out, for those that have too much give their
longest ones.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.batch import Float64Array, Int64Array, RankBatch, Scores, Texts
from largebatch.parallel.collectives import Collectives
from largebatch.phases import phase
from largebatch.step.hashes import id_hashes

WORTHWHILE = 0.02
"""Ranks exchange nothing unless the longest part exceeds the mean by this share."""


class Pairs(NamedTuple):
    """One rank's part of a global batch, as numbers that can go to another rank."""

    queries: Texts
    """b texts."""
    documents: Texts
    """b texts, each the positive of the query in the same row."""
    negatives: Texts
    """n texts."""
    negative_counts: Int64Array | None
    """`[b]`, how many of the negatives are each query's own, in the queries' order; None: they are
    nobody's own."""
    id_hashes: Int64Array | None
    """`[b]`, of the pairs' records; None: nobody knows them."""
    labels: Float64Array | None = None
    """`[b]`, what each pair's similarity is to follow; None: nobody says."""
    scores: Scores | None = None
    """A teacher's, where `negative_counts` says whose the negatives are; None: there is none."""

    @classmethod
    def of(cls, batch: RankBatch) -> "Pairs":
        """Return what a batch holds."""
        counts, ids = batch.negative_counts, batch.same_ids
        return cls(
            batch.queries,
            batch.documents,
            batch.negatives,
            None if counts is None else counts.astype(np.int64),
            None if ids is None else id_hashes(ids),
            batch.labels,
            batch.scores,
        )

    @property
    def tokens(self) -> Int64Array:
        """`[b]` tokens of each pair and of its own negatives; nobody's follow, `[b + n]`.

        These are the loads that can go to another rank, each as a whole.
        """
        pairs = self.queries.lengths.astype(np.int64) + self.documents.lengths
        lengths = self.negatives.lengths.astype(np.int64)
        if self.negative_counts is None:
            return np.concatenate([pairs, lengths])
        np.add.at(pairs, np.repeat(np.arange(len(pairs)), self.negative_counts), lengths)
        return pairs

    def take(self, loads: npt.NDArray[Any]) -> "Pairs":
        """Return some of the loads, by their place in `tokens`."""
        b = self.queries.num_texts
        pairs, negatives = loads[loads < b], loads[loads >= b] - b
        counts = None
        if self.negative_counts is not None:
            counts = self.negative_counts[pairs]
            first = (np.cumsum(self.negative_counts) - self.negative_counts)[pairs]
            before = np.cumsum(counts) - counts
            negatives = np.repeat(first - before, counts) + np.arange(int(counts.sum()))
        scores = self.scores
        if scores is not None:
            scores = Scores(scores.documents[pairs], scores.negatives[negatives])
        return Pairs(
            self.queries.take(pairs),
            self.documents.take(pairs),
            self.negatives.take(negatives),
            counts,
            None if self.id_hashes is None else self.id_hashes[pairs],
            None if self.labels is None else self.labels[pairs],
            scores,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """Join several parts, in order."""
        counts = [part.negative_counts for part in parts if part.negative_counts is not None]
        hashes = [part.id_hashes for part in parts if part.id_hashes is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            Texts.concatenate([part.queries for part in parts]),
            Texts.concatenate([part.documents for part in parts]),
            Texts.concatenate([part.negatives for part in parts]),
            np.concatenate(counts) if counts else None,
            np.concatenate(hashes) if hashes else None,
            np.concatenate(labels) if labels else None,
            Scores.concatenate(scores) if scores else None,
        )


def balanced_pairs(batch: RankBatch, collectives: Collectives, *, balance: bool) -> Pairs:
    """Return this rank's pairs of a step: the batch's, or those that it has after the exchange."""
    pairs = Pairs.of(batch)
    if not balance:
        return pairs
    with phase("gather"):
        return exchange_pairs(pairs, collectives)


def exchange_pairs(pairs: Pairs, collectives: Collectives) -> Pairs:
    """Return this rank's part after the exchange; all ranks must call it.

    One small all-gather between hosts, and a second one of the texts that move, if any do.
    """
    rank, size = collectives.world.rank, collectives.world.size
    if size == 1:
        return pairs
    known = _Known.of(pairs)
    header = [*known, pairs.queries.num_texts]
    counts = np.empty(0, np.int64) if pairs.negative_counts is None else pairs.negative_counts
    told = collectives.gather_ragged(np.concatenate([header, counts, pairs.tokens]))
    k = len(known)
    assert all(tuple(numbers[:k]) == known for numbers in told), "ranks know different things"
    num_pairs = [int(numbers[k]) for numbers in told]
    own = [k + 1 + (b if known.counts else 0) for b in num_pairs]
    counts_of_ranks = [numbers[k + 1 : end] for numbers, end in zip(told, own, strict=True)]
    tokens = [numbers[end:] for numbers, end in zip(told, own, strict=True)]
    owners = new_owners(tokens)
    given = [np.flatnonzero(owner != number) for number, owner in enumerate(owners)]
    if not any(len(loads) for loads in given):
        return pairs
    sizes = [
        _message_size(*one, known)
        for one in zip(tokens, counts_of_ranks, num_pairs, given, strict=True)
    ]
    messages = collectives.gather_ragged(_message(pairs.take(given[rank])), most=max(sizes))
    parts = [pairs.take(np.flatnonzero(owners[rank] == rank))]
    for owner, loads, b, message in zip(owners, given, num_pairs, messages, strict=True):
        mine = np.flatnonzero(owner[loads] == rank)
        if len(mine):
            parts.append(_read(message, loads < b, known).take(mine))
    return Pairs.concatenate(parts)


class _Known(NamedTuple):
    """What all ranks know of their pairs, or none does."""

    counts: bool
    ids: bool
    labels: bool
    scores: bool

    @classmethod
    def of(cls, pairs: Pairs) -> "_Known":
        assert pairs.scores is None or pairs.negative_counts is not None, "whose are the scores?"
        knowledge = (pairs.negative_counts, pairs.id_hashes, pairs.labels, pairs.scores)
        return cls(*(one is not None for one in knowledge))


def new_owners(tokens: Sequence[Int64Array]) -> list[Int64Array]:
    """Return which rank embeds what: for each rank, the new rank of each thing that it has.

    Args:
        tokens: For each rank, the tokens of each thing.

    A rank above the mean gives its longest things that fit into what it has too much; together,
    longest first, each goes to the rank that has least then. Those that give nothing keep all.

    >>> new_owners([np.array([7, 2, 5]), np.array([1, 3])])
    [array([0, 0, 1]), array([1, 1])]
    """
    held = [int(own.sum()) for own in tokens]
    owners = [np.full(len(own), rank) for rank, own in enumerate(tokens)]
    mean = sum(held) / len(held)
    if max(held) <= mean * (1 + WORTHWHILE):
        return owners
    given: list[tuple[int, int, int]] = []
    for rank in [rank for rank, number in enumerate(held) if number > mean]:
        own = tokens[rank]
        for load in _longest_that_fit(own, held[rank] - mean):
            given.append((-int(own[load]), rank, load))
            held[rank] -= int(own[load])
    least = [(number, rank) for rank, number in enumerate(held)]
    heapq.heapify(least)
    for negative_length, rank, load in sorted(given):
        number, receiver = least[0]
        owners[rank][load] = receiver
        heapq.heapreplace(least, (number - negative_length, receiver))
    return owners


def _longest_that_fit(tokens: Int64Array, room: float) -> list[int]:
    """Return which things to take, longest first, for a sum that is at most `room`."""
    order = np.argsort(tokens, kind="stable")
    ascending = tokens[order]
    taken: list[int] = []
    end = len(order)
    while True:
        end = min(end, int(np.searchsorted(ascending, room, side="right"))) - 1
        if end < 0 or ascending[end] == 0:
            return taken
        taken.append(int(order[end]))
        room -= int(ascending[end])


def _message(pairs: Pairs) -> Int64Array:
    sides = (pairs.queries, pairs.documents, pairs.negatives)
    of_pairs = [one for one in (pairs.id_hashes, pairs.negative_counts) if one is not None]
    # Numbers with a fraction go as they are, bit by bit.
    if pairs.labels is not None:
        of_pairs.append(pairs.labels.view(np.int64))
    if pairs.scores is not None:
        of_pairs += [scores.view(np.int64) for scores in pairs.scores]
    lengths = [side.lengths.astype(np.int64) for side in sides]
    tokens = [side.tokens.astype(np.int64) for side in sides]
    return np.concatenate([*of_pairs, *lengths, *tokens])


def _message_size(
    tokens: Int64Array, counts: Int64Array, num_pairs: int, loads: Int64Array, known: _Known
) -> int:
    """Return how long a rank's message is, which all know: so one gather has room for all."""
    pairs = loads[loads < num_pairs]
    num_negatives = int(counts[pairs].sum()) if known.counts else len(loads) - len(pairs)
    of_negatives = num_negatives * (1 + known.scores)
    return len(pairs) * (2 + sum(known)) + of_negatives + int(tokens[loads].sum())


def _read(message: Int64Array, are_pairs: npt.NDArray[np.bool_], known: _Known) -> Pairs:
    """Return what `_message` was made of."""
    b = int(are_pairs.sum())
    num_negatives = len(are_pairs) - b
    if known.counts:
        begin = b if known.ids else 0
        num_negatives = int(message[begin : begin + b].sum())
    of_pairs = [b * known.ids, b * known.counts, b * known.labels, b * known.scores]
    numbers = [*of_pairs, num_negatives * known.scores, b, b, num_negatives]
    hashes, counts, labels, of_documents, of_negatives, *lengths, tokens = np.split(
        message, np.cumsum(numbers)
    )
    sides = np.split(tokens, np.cumsum([side.sum() for side in lengths])[:-1])
    queries, documents, negatives = (
        Texts(side.astype(np.int32), own.astype(np.int32))
        for side, own in zip(sides, lengths, strict=True)
    )
    return Pairs(
        queries,
        documents,
        negatives,
        counts if known.counts else None,
        hashes if known.ids else None,
        labels.view(np.float64) if known.labels else None,
        Scores(of_documents.view(np.float64), of_negatives.view(np.float64))
        if known.scores
        else None,
    )
