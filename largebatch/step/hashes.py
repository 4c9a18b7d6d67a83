"""Int64Array that tell equal texts and equal records, the same on every rank and machine."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from largebatch.batch import Int64Array, Texts

_TOKENS_AT_ONCE = 1 << 17
"""Bounds the working memory (a few MiB) and keeps it in the processor's cache."""


def text_hashes(texts: Texts) -> Int64Array:
    """Return a 64-bit hash of each text's tokens, `[n]`.

    The sum of (token + 1) times an odd random number that belongs to its place, modulo 2^64
    (multilinear hashing, arXiv 1202.4961). Texts that are cut to the same tokens hash alike: they
    are the same to the encoder. A million different texts share a hash in about one of 10^7 cases.
    """
    ends = np.cumsum(texts.lengths, dtype=np.int64)
    starts = ends - texts.lengths
    multipliers = _multipliers(int(texts.lengths.max(initial=0)))
    hashes = np.zeros(texts.num_texts, np.uint64)
    first = 0
    while first < texts.num_texts:
        last = int(np.searchsorted(ends, starts[first] + _TOKENS_AT_ONCE, side="right"))
        rows = slice(first, max(last, first + 1))
        tokens = slice(int(starts[first]), int(ends[rows][-1]))
        places = np.arange(tokens.start, tokens.stop) - np.repeat(starts[rows], texts.lengths[rows])
        terms = (texts.tokens[tokens].astype(np.uint64) + np.uint64(1)) * multipliers[places]
        # Sums wrap around, and so do their differences: empty texts need no care.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        hashes[rows] = sums[ends[rows] - tokens.start] - sums[starts[rows] - tokens.start]
        first = rows.stop
    return hashes.view(np.int64)


def id_hashes(ids: Sequence[str]) -> Int64Array:
    """Return a 64-bit hash of each record's id, `[n]`."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def _multipliers(number: int) -> npt.NDArray[np.uint64]:
    # The bit generator's raw stream is fixed by its algorithm, unlike what Generator draws from it.
    return np.random.PCG64(0).random_raw(number) | np.uint64(1)
