"""Even parts: ranks exchange pairs, so that none has more tokens to embed than the others.

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

from largebatch.batch import Texts
from largebatch.parallel.collectives import Collectives

WORTHWHILE = 0.02
"""Ranks exchange nothing unless the longest part exceeds the mean by this share."""

Numbers = npt.NDArray[np.int64]


class Part(NamedTuple):
    """One rank's part of a global batch, without what only a person reads."""

    queries: Texts
    """b texts."""
    documents: Texts
    """b texts, each the positive of the query in the same row."""
    negatives: Texts
    """n texts, negatives for every query of all ranks."""
    id_hashes: Numbers | None
    """`[b]`, of the pairs' records; None: nobody knows them."""

    @property
    def tokens(self) -> Numbers:
        """`[b + n]`, the tokens of each pair and of each negative: what can go to another rank."""
        pairs = self.queries.lengths.astype(np.int64) + self.documents.lengths
        return np.concatenate([pairs, self.negatives.lengths.astype(np.int64)])

    def take(self, units: npt.NDArray[Any]) -> "Part":
        """Return some pairs and negatives, by their place in `tokens`."""
        b = self.queries.num_texts
        pairs, negatives = units[units < b], units[units >= b] - b
        return Part(
            self.queries.take(pairs),
            self.documents.take(pairs),
            self.negatives.take(negatives),
            None if self.id_hashes is None else self.id_hashes[pairs],
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Part"]) -> "Part":
        """Join several parts, in order."""
        hashes = [part.id_hashes for part in parts if part.id_hashes is not None]
        return cls(
            Texts.concatenate([part.queries for part in parts]),
            Texts.concatenate([part.documents for part in parts]),
            Texts.concatenate([part.negatives for part in parts]),
            np.concatenate(hashes) if hashes else None,
        )


def even_out(part: Part, collectives: Collectives) -> Part:
    """Return this rank's part after the exchange; all ranks must call it.

    One small all-gather between hosts, and a second one of the texts that move, if any do.
    """
    rank, size = collectives.world.rank, collectives.world.size
    if size == 1:
        return part
    knows_ids = part.id_hashes is not None
    header = [knows_ids, part.queries.num_texts]
    told = collectives.gather_ragged(np.concatenate([header, part.tokens]))
    assert all(numbers[0] == knows_ids for numbers in told), "ranks know different things"
    num_pairs = [int(numbers[1]) for numbers in told]
    tokens = [numbers[2:] for numbers in told]
    owners = new_owners(tokens)
    given = [np.flatnonzero(owner != number) for number, owner in enumerate(owners)]
    if not any(len(units) for units in given):
        return part
    sizes = [_message_size(*one, knows_ids) for one in zip(tokens, num_pairs, given, strict=True)]
    messages = collectives.gather_ragged(_message(part.take(given[rank])), most=max(sizes))
    parts = [part.take(np.flatnonzero(owners[rank] == rank))]
    for owner, units, b, message in zip(owners, given, num_pairs, messages, strict=True):
        mine = np.flatnonzero(owner[units] == rank)
        if len(mine):
            parts.append(_read(message, units < b, knows_ids).take(mine))
    return Part.concatenate(parts)


def new_owners(tokens: Sequence[Numbers]) -> list[Numbers]:
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
        for unit in _longest_that_fit(own, held[rank] - mean):
            given.append((-int(own[unit]), rank, unit))
            held[rank] -= int(own[unit])
    least = [(number, rank) for rank, number in enumerate(held)]
    heapq.heapify(least)
    for negative_length, rank, unit in sorted(given):
        number, receiver = least[0]
        owners[rank][unit] = receiver
        heapq.heapreplace(least, (number - negative_length, receiver))
    return owners


def _longest_that_fit(tokens: Numbers, room: float) -> list[int]:
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


def _message(part: Part) -> Numbers:
    sides = (part.queries, part.documents, part.negatives)
    hashes = [] if part.id_hashes is None else [part.id_hashes]
    lengths = [side.lengths.astype(np.int64) for side in sides]
    tokens = [side.tokens.astype(np.int64) for side in sides]
    return np.concatenate([*hashes, *lengths, *tokens])


def _message_size(tokens: Numbers, num_pairs: int, units: Numbers, knows_ids: bool) -> int:
    """Return how long a rank's message is, which all know: so one gather has room for all."""
    per_pair = 3 if knows_ids else 2
    pairs = int((units < num_pairs).sum())
    return pairs * per_pair + (len(units) - pairs) + int(tokens[units].sum())


def _read(message: Numbers, are_pairs: npt.NDArray[np.bool_], knows_ids: bool) -> Part:
    """Return what `_message` was made of."""
    num_pairs = int(are_pairs.sum())
    counts = [num_pairs if knows_ids else 0, num_pairs, num_pairs, len(are_pairs) - num_pairs]
    hashes, *lengths, tokens = np.split(message, np.cumsum(counts))
    sides = np.split(tokens, np.cumsum([side.sum() for side in lengths])[:-1])
    queries, documents, negatives = (
        Texts(side.astype(np.int32), own.astype(np.int32))
        for side, own in zip(sides, lengths, strict=True)
    )
    return Part(queries, documents, negatives, hashes if knows_ids else None)
