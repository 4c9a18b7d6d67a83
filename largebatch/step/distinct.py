"""Texts that occur twice in a rank's part are encoded once."""

from typing import NamedTuple

import numpy as np

from largebatch.batch import Texts
from largebatch.model.chunks import TextRows


class DistinctTexts(NamedTuple):
    """Texts without repetitions."""

    texts: Texts
    """`u` texts, in the order in which each occurs first."""
    numbers: TextRows
    """`[n]`, which of them each of the given texts is."""


def distinct_texts(texts: Texts, num_pairs: int) -> DistinctTexts:
    """Return the texts that differ, so that each is encoded once.

    Args:
        texts: `num_pairs` queries, their documents in the same order, and any further texts.
        num_pairs: How many pairs there are.

    A query that equals its own document is not merged with it: as in SimCSE, their embeddings then
    differ by their dropout masks, and by that alone. (Such queries are merged with each other.)
    """
    buffer = np.ascontiguousarray(texts.tokens).tobytes()
    width = texts.tokens.itemsize
    # Python's own dict: one pass, no comparison of texts that differ in their hash.
    contents = [
        buffer[width * start : width * (start + length)]
        for start, length in zip(texts.starts.tolist(), texts.lengths.tolist(), strict=True)
    ]
    place: dict[tuple[bytes, bool], int] = {}
    index = np.empty(len(contents), np.intp)
    first: list[int] = []
    for row, content in enumerate(contents):
        equals_own = row < num_pairs and content == contents[row + num_pairs]
        number = place.setdefault((content, equals_own), len(first))
        if number == len(first):
            first.append(row)
        index[row] = number
    if len(first) == len(contents):
        return DistinctTexts(texts, index)
    return DistinctTexts(texts.take(np.array(first, np.intp)), index)
