"""Made-up texts with a realistic spread of lengths, for who has no shards at hand."""

from pathlib import Path

import numpy as np

from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter

SIGMA = 0.8
MEDIAN_SHARE = 1 / 3
"""Median length, as a share of the longest that is allowed."""
SHORTEST = 4
"""Words; shorter texts would often be the same."""
# So common that each is a token of any tokenizer for English.
COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who oil its now find long down day did get come made may part"
)
WORDS = COMMON.split(" ")


def write_synthetic_shards(
    folder: Path, num_records: int, *, query_max_tokens: int, document_max_tokens: int, seed: int
) -> None:
    """Write shards of pairs; the numbers of words are log-normal, cut at the longest allowed.

    Raises:
        UserError: The folder can't be written.
    """
    random = np.random.default_rng(seed)
    words = np.array(WORDS)
    with ShardWriter(folder, records_per_shard=10_000) as writer:
        for start in range(0, num_records, 1000):
            count = min(1000, num_records - start)
            sides = []
            for longest in (query_max_tokens, document_max_tokens):
                lengths = lognormal_lengths(count, longest, random)
                flat = words[random.integers(len(words), size=int(lengths.sum()))]
                sides.append([" ".join(t) for t in np.split(flat, np.cumsum(lengths)[:-1])])
            for number, (query, document) in enumerate(zip(*sides, strict=True), start=start):
                writer.write(Record(query, document, [], "", str(number)))


def lognormal_lengths(
    count: int, longest: int, random: np.random.Generator
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return lengths between SHORTEST and `longest`."""
    lengths = random.lognormal(np.log(MEDIAN_SHARE * longest), SIGMA, count)
    return lengths.clip(min(SHORTEST, longest), longest).astype(np.int64)
