"""Finds training texts that hold what evaluation sets ask or answer.

A text of a pair (its query or its document) is contaminated by an evaluation set if it

- is `same` as one of its queries or passages: the same words, case and punctuation aside;
- is `near` one: the Jaccard similarity of their sets of word n-grams reaches the threshold;
- `holds` one: 13 words in a row of a query, or all words of a passage of at least 13 words. Of a
  query or passage of 8 to 12 words it must hold all. A shorter one is only ever `same` or `near`,
  since a few words in a row say nothing.

13 and 8 are from Brown et al. 2020 (GPT-3, appendix C), who look for n-grams as long as a set's
shorter examples, but of 8 words at least and of 13 at most, and ignore case and punctuation too.
Queries count by any of their runs, since a question is what a test asks for; passages, which often
share a sentence with other texts, count as wholes. All queries and passages of a set count, whether
a split judges them or not. Some sets have passages of a word or two ("Washington"); a pair with
such an answer goes too, which the counts by way show. What only means the same in other words is
not found.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.curate import minhash
from largebatch.curate.minhash import Bands, Signatures, TextHashes, UInt64Array
from largebatch.curate.textfile import TextFile, TextFileWriter
from largebatch.evaluate.beir import load_retrieval_set
from largebatch.files import write_array

WAYS = (
    "same_query",
    "same_passage",
    "near_query",
    "near_passage",
    "holds_query",
    "holds_passage",
)
"""How a text can be contaminated; of several, the first is reported."""

MIN_RUN_WORDS = 8
MAX_RUN_WORDS = 13

_TEXTS_PER_PART = 2000
_FILTER_BITS_PER_RUN = 16
_MAX_BUCKET = 64
"""Most texts of one bucket that a text is compared with, lest templates cost without end."""


class Match(NamedTuple):
    """What a training text has in common with an evaluation set."""

    way: str
    """One of `WAYS`."""
    evaluation_text: int
    """Number of the query or passage, for `EvaluationIndex.texts`."""
    similarity: float
    """Jaccard similarity to it; for a text that holds it, of the part that does: 1."""


class NearSettings(NamedTuple):
    """What makes a text near another."""

    threshold: float
    """Jaccard similarity from which two texts are near duplicates."""
    ngram_words: int
    """Words in a row that make one element of a text's set."""
    num_hashes: int
    """Length of a text's signature."""

    @property
    def bands(self) -> Bands:
        """How signatures of texts are cut."""
        return minhash.choose_bands(self.threshold, self.num_hashes)


class Table(NamedTuple):
    """Which evaluation texts have a hash: sorted, one row per text and hash."""

    hashes: UInt64Array
    """`[n]`, ascending."""
    texts: npt.NDArray[np.uint32]
    """`[n]`, numbers of texts; ascending among equal hashes."""
    starts: npt.NDArray[np.uint32]
    """`[n]`, the word at which what was hashed begins."""


def build_index(
    sets: Mapping[str, Path],
    folder: Path,
    *,
    near: NearSettings | None,
    on_set: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Write the index of evaluation sets into `folder`, for `EvaluationIndex`.

    With `near` unset, near duplicates are not looked for. `on_set` is called with 1 after each
    set. Returns each set's name and its numbers of queries and passages. Raises UserError as
    `load_retrieval_set` does.
    """
    folder.mkdir(parents=True)
    sizes: list[dict[str, Any]] = []
    set_of: list[npt.NDArray[np.uint16]] = []
    is_query: list[npt.NDArray[np.bool_]] = []
    tables: dict[str, list[Table]] = defaultdict(list)
    with TextFileWriter(folder / "texts") as writer:
        first = 0
        for number, (name, path) in enumerate(sets.items()):
            loaded = load_retrieval_set(path, split=_any_split(path), name=name)
            sizes.append(
                {"name": name, "queries": len(loaded.queries), "passages": len(loaded.corpus)}
            )
            texts = [*loaded.queries.values(), *loaded.corpus.values()]
            set_of.append(np.full(len(texts), number, np.uint16))
            is_query.append(np.arange(len(texts)) < len(loaded.queries))
            for begin in range(0, len(texts), _TEXTS_PER_PART):
                part = [minhash.normalize(t) for t in texts[begin : begin + _TEXTS_PER_PART]]
                writer.append(part)
                queries = is_query[-1][begin : begin + _TEXTS_PER_PART]
                for key, table in _tables_of(part, queries, near).items():
                    tables[key].append(table._replace(texts=table.texts + np.uint32(first)))
                first += len(part)
            on_set(1)
    write_array(folder / "set_of.npy", np.concatenate(set_of))
    write_array(folder / "is_query.npy", np.concatenate(is_query))
    for key, parts in tables.items():
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        for name, column in zip(Table._fields, columns, strict=True):
            write_array(folder / f"{key}.{name}.npy", column[order])
    return sizes


class EvaluationIndex:
    """The queries and passages of evaluation sets, by their hashes; read from a folder."""

    def __init__(self, folder: Path, *, near: NearSettings | None) -> None:
        self.texts = TextFile(folder / "texts")
        self.set_of = np.load(folder / "set_of.npy")
        """Number of each text's set."""
        self._is_query = np.load(folder / "is_query.npy")
        self._near = near
        self._whole = _load(folder, "whole")
        sizes = range(MIN_RUN_WORDS, MAX_RUN_WORDS + 1)
        self._runs = {n: _load(folder, f"run{n}") for n in sizes}
        self._bands = (
            [] if near is None else [_load(folder, f"band{n}") for n in range(near.bands.num_bands)]
        )
        self._filters = {n: _Filter(table.hashes) for n, table in self._runs.items()}

    def find(
        self, normalized: Sequence[str], words: TextHashes, signatures: Signatures | None
    ) -> dict[int, Match]:
        """Return the contaminated ones among texts, by their places in `normalized`.

        `words` are their words and marks; `signatures` those of their sets (None without `near`).
        """
        found: dict[int, Match] = {}
        plain = minhash.without_marks(words)
        for row, match in self._same(normalized, plain):
            _keep_first(found, row, match)
        if signatures is not None:
            for row, match in self._near_ones(normalized, signatures):
                _keep_first(found, row, match)
        for row, match in self._held(normalized, plain):
            _keep_first(found, row, match)
        return found

    def _same(self, normalized: Sequence[str], words: TextHashes) -> list[tuple[int, Match]]:
        wholes = minhash.hash_whole(words)
        matches = []
        for row, entry in _lookup(self._whole, wholes):
            # A text of marks alone has no words, and is like no other.
            if not words.lengths[row]:
                continue
            text = int(self._whole.texts[entry])
            if minhash.words_of(normalized[row]) == minhash.words_of(self.texts[text]):
                matches.append((row, self._match("same", text, 1.0)))
        return matches

    def _near_ones(
        self, normalized: Sequence[str], signatures: Signatures
    ) -> list[tuple[int, Match]]:
        assert self._near is not None
        keys = minhash.band_keys(signatures, self._near.bands)
        candidates = {
            (row, int(table.texts[entry]))
            for number, table in enumerate(self._bands)
            for row, entry in _lookup(table, keys[:, number], at_most=_MAX_BUCKET)
        }
        matches = []
        for row, text in sorted(candidates):
            value = minhash.similarity(normalized[row], self.texts[text], self._near.ngram_words)
            if value >= self._near.threshold:
                matches.append((row, self._match("near", text, value)))
        return matches

    def _held(self, normalized: Sequence[str], words: TextHashes) -> list[tuple[int, Match]]:
        matches = []
        runs = words.hashes
        for size in range(2, MAX_RUN_WORDS + 1):
            runs = minhash.next_run(runs, words.hashes, size)
            if size < MIN_RUN_WORDS or not len(self._runs[size].hashes):
                continue
            places = self._filters[size].maybe(runs)
            rows = np.searchsorted(words.offsets, places, side="right") - 1
            # A run that reaches into the next text comes so far, and fails by its words.
            for number, entry in _lookup(self._runs[size], runs[places], at_most=_MAX_BUCKET):
                row = int(rows[number])
                start = int(places[number] - words.offsets[row])
                text = int(self._runs[size].texts[entry])
                needed = minhash.words_of(self.texts[text])
                if self._is_query[text]:
                    begin = int(self._runs[size].starts[entry])
                    needed = needed[begin : begin + size]
                there = minhash.words_of(normalized[row])[start : start + len(needed)]
                if there == needed:
                    matches.append((row, self._match("holds", text, 1.0)))
        return matches

    def _match(self, how: str, text: int, similarity: float) -> Match:
        kind = "query" if self._is_query[text] else "passage"
        return Match(f"{how}_{kind}", text, similarity)


class _Filter:
    """A Bloom filter with one hash: tells most runs that are surely in no evaluation text."""

    def __init__(self, hashes: UInt64Array) -> None:
        bits = max(20, (_FILTER_BITS_PER_RUN * len(hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._there = np.zeros(1 << bits, np.bool_)
        self._there[hashes >> self._shift] = True

    def maybe(self, hashes: UInt64Array) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self._there[hashes >> self._shift])


def _tables_of(
    normalized: Sequence[str], is_query: npt.NDArray[np.bool_], near: NearSettings | None
) -> dict[str, Table]:
    words = minhash.hash_words(normalized)
    plain = minhash.without_marks(words)
    everyone = np.arange(len(normalized), dtype=np.uint32)
    tables = {"whole": Table(minhash.hash_whole(plain), everyone, np.zeros_like(everyone))}
    runs = plain.hashes
    text_of = np.repeat(everyone, plain.lengths)
    start = np.arange(len(plain.hashes)) - np.repeat(plain.offsets[:-1], plain.lengths)
    length = np.repeat(plain.lengths, plain.lengths)
    for size in range(2, MAX_RUN_WORDS + 1):
        runs = minhash.next_run(runs, plain.hashes, size)
        if size < MIN_RUN_WORDS:
            continue
        num = len(runs)
        of_query = np.repeat(is_query, plain.lengths)[:num]
        taken = start[:num] + size <= length[:num]
        if size < MAX_RUN_WORDS:
            taken &= length[:num] == size
        else:
            taken &= of_query | (start[:num] == 0)
        tables[f"run{size}"] = Table(
            runs[taken], text_of[:num][taken], start[:num][taken].astype(np.uint32)
        )
    if near is not None:
        sets = minhash.ngrams(words, near.ngram_words)
        keys = minhash.band_keys(minhash.sign(sets, near.num_hashes), near.bands)
        for number in range(near.bands.num_bands):
            column = np.ascontiguousarray(keys[:, number])
            tables[f"band{number}"] = Table(column, everyone, np.zeros_like(everyone))
    return tables


def _lookup(table: Table, hashes: UInt64Array, *, at_most: int = 1 << 30) -> list[tuple[int, int]]:
    """Return pairs of a place in `hashes` and an entry of the table with the same hash."""
    begins = np.searchsorted(table.hashes, hashes, side="left")
    there = begins < len(table.hashes)
    there[there] = table.hashes[begins[there]] == hashes[there]
    rows = np.flatnonzero(there)
    ends = np.searchsorted(table.hashes, hashes[rows], side="right")
    return [
        (int(row), entry)
        for row, end in zip(rows, ends, strict=True)
        for entry in range(int(begins[row]), min(int(end), int(begins[row]) + at_most))
    ]


def _keep_first(found: dict[int, Match], row: int, match: Match) -> None:
    """Keep the match of the first way, then of the first text, whatever the order they come in."""
    rank = WAYS.index(match.way), match.evaluation_text
    known = found.get(row)
    if known is None or rank < (WAYS.index(known.way), known.evaluation_text):
        found[row] = match


def _load(folder: Path, key: str) -> Table:
    # Mapped, so that worker processes share one copy.
    return Table(*(np.load(folder / f"{key}.{name}.npy", mmap_mode="r") for name in Table._fields))


def _any_split(folder: Path) -> str:
    """Return a split that the set has: its judgments are not used, only its texts."""
    files = sorted(folder.glob("qrels/*.tsv*"))
    return files[0].name.partition(".tsv")[0] if files else "test"
