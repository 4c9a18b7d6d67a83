"""Counts ids that several records carry, without keeping them."""

import hashlib
from array import array
from typing import NamedTuple

import numpy as np


class RepeatedIds(NamedTuple):
    """Ids that more than one record carries."""

    num_ids: int = 0
    """How many such ids there are."""
    num_records: int = 0
    """How many records carry one of them."""


class IdCounter:
    """Sees the id of each record; keeps 8 bytes of it, a hash.

    >>> counter = IdCounter()
    >>> for record_id in ("0", "1", "2", "0", "1", "0"):
    ...     counter.add(record_id)
    >>> counter.repeated()
    RepeatedIds(num_ids=2, num_records=5)
    """

    def __init__(self) -> None:
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, record_id: str) -> None:
        """Note a record's id."""
        self._hashes.frombytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest())

    def add_all(self, other: "IdCounter") -> None:
        """Note all that another counter has seen."""
        self._hashes.extend(other._hashes)

    def repeated(self) -> RepeatedIds:
        """Return how many ids repeat."""
        _, counts = np.unique(np.frombuffer(self._hashes, np.uint64), return_counts=True)
        several = counts[counts > 1]
        return RepeatedIds(len(several), int(several.sum()))


def describe_repeated(repeated: RepeatedIds, num_records: int, *, source: str = "NAME") -> str:
    """Say what ids that repeat among so many records of a source mean to training."""
    return (
        f"{repeated.num_records:,} of {num_records:,} records have an id that others have too (ids "
        f"that repeat: {repeated.num_ids:,}); training tells them apart by their places; if the "
        "same id means the same query, however it is put, set "
        f"data.sources.{source}.mask_same_id=true"
    )
