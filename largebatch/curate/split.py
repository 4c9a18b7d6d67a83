"""Split pairs of code by package into train, dev and test, with no text in two of them.

1. Packages that are installed together (torch, torchgen, functorch) form a family.
2. Families, in an order by the hash of their names, fill test, then dev; the rest is train.
3. A pair whose query or document occurred already is dropped. Since test is filled first, then dev,
   what vanishes from a held-out set never stays in train. Near-copies of held-out documents
   (another version of a vendored package, say) are dropped likewise.
"""

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from largebatch.curate.code_pairs import CodePair
from largebatch.errors import UserError

MAX_FAMILY_SHARE = 0.2
"""A family with more pairs than this share of a held-out set stays in train."""
SHINGLE_WORDS = 5
NEAR_COPY_SHARE = 0.6
"""Two documents are near-copies if this share of the shorter one's shingles is in the other."""


class Split(NamedTuple):
    """Pairs of each part, and what was left out and why."""

    train: list[CodePair]
    """In an order by the hash of the ids, so that every shard holds all packages."""
    dev: list[CodePair]
    """Family after family."""
    test: list[CodePair]
    """Family after family."""
    dropped: Counter[str]
    """How many pairs each reason left out."""


def package_families(roots: Sequence[Path]) -> dict[str, str]:
    """Return the family of each top-level package that a distribution below `roots` installed.

    Two packages are of one family if some distribution installs both. A family bears the name of
    its first package in alphabetical order.
    """
    families: dict[str, str] = {}
    for distribution in distributions(path=[str(root) for root in roots]):
        record = (distribution.read_text("RECORD") or "").splitlines()
        tops = {path.split("/")[0] for path, *_ in csv.reader(record)}
        names = {top.split(".")[0] for top in tops if not top.endswith((".dist-info", ".data"))}
        names = {name for name in names if name.isidentifier() and name != "__pycache__"}
        joined = {families.get(name, name) for name in names}
        for name in names | {name for name, family in families.items() if family in joined}:
            families[name] = min(joined)
    return families


def split_pairs(
    pairs: Iterable[CodePair],
    families: Mapping[str, str],
    *,
    dev_documents: int,
    test_documents: int,
    max_pairs: int,
) -> Split:
    """Return the pairs in three parts that share neither a family nor a text.

    Raises:
        UserError: there are too few pairs in packages that are small enough to be held out.
    """
    by_family: dict[str, list[CodePair]] = defaultdict(list)
    for pair in pairs:
        by_family[families.get(pair.package, pair.package)].append(pair)
    waiting = sorted(by_family, key=_hash)
    texts = _TextsSeen()
    held_out: dict[str, list[CodePair]] = {}
    for part, num_documents in (("test", test_documents), ("dev", dev_documents)):
        taken = held_out[part] = []
        for family in list(waiting):
            if len(taken) >= num_documents:
                break
            if len(by_family[family]) <= MAX_FAMILY_SHARE * num_documents:
                waiting.remove(family)
                taken.extend(p for p in by_family[family] if texts.admit(p, hold_out=True))
        if len(taken) < num_documents:
            raise UserError(
                f"{part}_documents={num_documents}: only {len(taken)} were found in packages that "
                f"hold at most {MAX_FAMILY_SHARE:.0%} of that; lower {part}_documents, or install "
                "more packages or name more folders in paths"
            )
    candidates = (pair for family in sorted(waiting) for pair in by_family[family])
    train = [pair for pair in candidates if texts.admit(pair, hold_out=False)]
    if not train:
        raise UserError(
            f"test_documents={test_documents} and dev_documents={dev_documents} leave no pairs to "
            "train on; lower them, or install more packages or name more folders in paths"
        )
    train.sort(key=lambda pair: _hash(pair.id))
    if len(train) > max_pairs:
        texts.dropped["over_max_pairs"] = len(train) - max_pairs
    return Split(train[:max_pairs], held_out["dev"], held_out["test"], texts.dropped)


class _TextsSeen:
    """Every text that was admitted, and an index of the held-out documents' shingles."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self._queries: set[str] = set()
        self._documents: set[str] = set()
        self._holders: dict[str, list[int]] = defaultdict(list)
        self._num_shingles: list[int] = []

    def admit(self, pair: CodePair, *, hold_out: bool) -> bool:
        """Return whether the pair is new, and remember it if so."""
        query = " ".join(_words(pair.query)) or pair.query
        document = "".join(pair.document.split())
        shingles = _shingles(pair.document)
        if query in self._queries:
            self.dropped["duplicate_query"] += 1
        elif document in self._documents:
            self.dropped["duplicate_document"] += 1
        elif self._is_near_copy(shingles):
            self.dropped["near_copy_of_held_out"] += 1
        else:
            self._queries.add(query)
            self._documents.add(document)
            if hold_out:
                for shingle in shingles:
                    self._holders[shingle].append(len(self._num_shingles))
                self._num_shingles.append(len(shingles))
            return True
        return False

    def _is_near_copy(self, shingles: set[str]) -> bool:
        shared = Counter(i for shingle in shingles for i in self._holders.get(shingle, ()))
        return any(
            number >= NEAR_COPY_SHARE * min(len(shingles), self._num_shingles[i])
            for i, number in shared.items()
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _shingles(document: str) -> set[str]:
    words = _words(document)
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
