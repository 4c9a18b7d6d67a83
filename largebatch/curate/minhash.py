"""Sets of word n-grams, their MinHash signatures, and the bands by which similar texts meet.

UInt64Array only propose: whatever is dropped was compared by its words (`similarity`, `words_of`).

1. A text is cut into words and marks (`split_words`), and each becomes 64 bits.
2. Each run of `ngram_words` of them is one element of the text's set (its shingles).
3. A signature (Broder 1997) is `num_hashes` numbers; two sets agree in each of them with the
   probability of their Jaccard similarity. `rensa` computes it.
4. A band is a few of these numbers. Texts that agree in a whole band are compared.
"""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

MIN_RECALL = 0.99
"""Share of the near duplicates right at the threshold that bands are chosen to find."""

_SEED = 42
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MAX_VOCABULARY = 1_000_000

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


class TextHashes(NamedTuple):
    """Hashes of several texts, one text after another."""

    hashes: UInt64Array
    """`[sum of the texts' numbers]`."""
    offsets: npt.NDArray[np.int64]
    """`[n + 1]`: text `i` has the hashes from `offsets[i]` up to `offsets[i + 1]`."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[n]`, the number of hashes of each text."""
        return np.diff(self.offsets)


class Bands(NamedTuple):
    """How signatures are cut: texts that agree in all rows of any band are compared."""

    num_bands: int
    """How many there are."""
    num_rows: int
    """Numbers of a signature in each."""

    def recall(self, similarity: float) -> float:
        """Return the probability that texts of this Jaccard similarity are compared.

        >>> round(Bands(16, 4).recall(0.8), 4)
        0.9998
        """
        return float(1 - (1 - similarity**self.num_rows) ** self.num_bands)


def normalize(text: str) -> str:
    """Return a text in NFKC form, without case, and with single spaces.

    >>> normalize("  Read   the ＭＡＮＵＡＬ ")
    'read the manual'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def split_words(normalized: str) -> list[str]:
    """Cut a normalized text into words and single marks; marks tell `a < b` from `a > b`.

    >>> split_words("ls -l | wc")
    ['ls', '-', 'l', '|', 'wc']
    """
    return _WORD.findall(normalized)


def words_of(normalized: str) -> list[str]:
    """Return the words of a normalized text, without marks."""
    return [word for word in split_words(normalized) if _is_word(word)]


def hash_words(normalized: Sequence[str]) -> TextHashes:
    """Hash the words and marks of texts; the lowest bit tells words from marks."""
    if len(_VOCABULARY) > _MAX_VOCABULARY:
        _VOCABULARY.clear()
    words = [split_words(text) for text in normalized]
    offsets = np.zeros(len(words) + 1, np.int64)
    np.cumsum([len(w) for w in words], out=offsets[1:])
    flat = map(_VOCABULARY.__getitem__, itertools.chain.from_iterable(words))
    return TextHashes(np.fromiter(flat, np.uint64, int(offsets[-1])), offsets)


def without_marks(rows: TextHashes) -> TextHashes:
    """Return the words among words and marks."""
    is_word = (rows.hashes & np.uint64(1)).astype(bool)
    before = np.concatenate([[0], np.cumsum(is_word, dtype=np.int64)])
    return TextHashes(rows.hashes[is_word], before[rows.offsets])


def hash_whole(rows: TextHashes) -> UInt64Array:
    """Return one hash per text, of all its words in order; 0 for a text without any."""
    lengths = rows.lengths
    powers = np.full(int(lengths.max(initial=0)) + 1, _BASE)
    np.multiply.accumulate(powers, out=powers)
    position = np.arange(len(rows.hashes)) - np.repeat(rows.offsets[:-1], lengths)
    before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(rows.hashes * powers[position])])
    wholes: UInt64Array = before[rows.offsets[1:]] - before[rows.offsets[:-1]]
    return wholes


def next_run(runs: UInt64Array, hashes: UInt64Array, size: int) -> UInt64Array:
    """Make the hashes of runs of `size` words from those of `size - 1`.

    `runs[i]` is the run that begins at word `i`; runs reach across the ends of texts, where the
    caller must not look.
    """
    num = max(len(hashes) - size + 1, 0)
    return runs[:num] * _BASE + hashes[size - 1 :]


def ngrams(rows: TextHashes, size: int) -> TextHashes:
    """Return the set of each text: a hash for each run of `size` words, with repetitions.

    Each text is padded at both ends, so that its first and last words are in as many runs as the
    others: "... as YAML" is not nearer to "... as JSON" than if they differed in the middle.
    """
    pad = size - 1
    num_texts = len(rows.offsets) - 1
    shift = np.repeat(np.arange(num_texts) * 2 * pad + pad, rows.lengths)
    padded = np.zeros(len(rows.hashes) + 2 * pad * num_texts, np.uint64)
    padded[np.arange(len(rows.hashes)) + shift] = rows.hashes
    runs = padded
    for n in range(2, size + 1):
        runs = next_run(runs, padded, n)
    begins = rows.offsets + 2 * pad * np.arange(num_texts + 1)
    is_inside = np.ones(len(runs), np.bool_)
    for back in range(1, pad + 1):
        # Runs that begin in one text's last padding and reach into the next text.
        is_inside[begins[1:-1] - back] = False
    return TextHashes(_mix(runs[is_inside]), rows.offsets + pad * np.arange(num_texts + 1))


def sign(sets: TextHashes, num_hashes: int) -> Signatures:
    """Return the MinHash signatures `[n, num_hashes]` of sets."""
    # Imported here: only de-duplication needs it.
    from rensa import RMinHash

    if len(sets.offsets) == 1:
        return np.empty((0, num_hashes), np.uint32)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        sets.hashes, sets.offsets.astype(np.uint64), num_hashes, _SEED
    )
    flat = itertools.chain.from_iterable(matrix.to_rows())
    size = (len(sets.offsets) - 1) * num_hashes
    return np.fromiter(flat, np.uint32, size).reshape(-1, num_hashes)


def choose_bands(similarity: float, num_hashes: int) -> Bands:
    """Choose the most rows per band with which `MIN_RECALL` of the pairs at `similarity` meet.

    More rows bring fewer useless comparisons. Where no number of rows is enough, it is 1.

    >>> choose_bands(0.8, 64)
    Bands(num_bands=12, num_rows=5)
    """
    for num_rows in range(num_hashes, 1, -1):
        bands = Bands(num_hashes // num_rows, num_rows)
        if bands.recall(similarity) >= MIN_RECALL:
            return bands
    return Bands(num_hashes, 1)


def band_keys(signatures: Signatures, bands: Bands) -> UInt64Array:
    """Return a hash `[n, num_bands]` of the rows of each band."""
    used = signatures[:, : bands.num_bands * bands.num_rows].astype(np.uint64)
    rows = used.reshape(-1, bands.num_bands, bands.num_rows)
    keys = np.zeros(rows.shape[:2], np.uint64)
    for number in range(bands.num_rows):
        keys = _mix(keys * _BASE + rows[:, :, number])
    return keys


def join_keys(queries: UInt64Array, documents: UInt64Array) -> UInt64Array:
    """Return keys of pairs, which are equal where both sides' are."""
    return _mix(queries * _BASE + documents)


def similarity(first: str, second: str, ngram_words: int) -> float:
    """Return the Jaccard similarity of the sets of two normalized texts, from the words themselves.

    >>> similarity("a b c d e", "a b c d f", 3)  # 4 of the 10 runs are in both
    0.4
    """
    if first == second:
        return 1.0
    one, other = _set_of(first, ngram_words), _set_of(second, ngram_words)
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


@lru_cache(maxsize=8192)
def _set_of(normalized: str, size: int) -> frozenset[tuple[str, ...]]:
    padding = [""] * (size - 1)
    words = [*padding, *split_words(normalized), *padding]
    starts = range(len(words) - size + 1)
    return frozenset(tuple(words[start : start + size]) for start in starts)


def _is_word(word: str) -> bool:
    # Vowel signs (category M) of Indic scripts are no marks that one could do without.
    first = word[0]
    return first.isalnum() or first == "_" or unicodedata.category(first).startswith("M")


def _mix(hashes: UInt64Array) -> UInt64Array:
    """Spread hashes evenly over 64 bits, one to one (the finalizer of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = hashes ^ (hashes >> np.uint64(31))
    return mixed


class _Vocabulary(dict[str, int]):
    """Hashes of words; the same in every process, unlike Python's own."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "little") & ~1 | _is_word(word)
        self[word] = value
        return value


_VOCABULARY = _Vocabulary()
