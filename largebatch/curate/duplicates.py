"""Decides which records are duplicates, from arrays of hashes; knows nothing of texts or files.

Records have numbers, in the order of the sources and of the records in each. The earlier record
keeps: a record is only ever dropped for one of a lower number that is itself kept.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.curate.minhash import UInt64Array

Numbers = npt.NDArray[np.int64]

MAX_LINKS = 32
"""In a bucket of more records, each is linked to the first and to the last so many before it, and
not to all: templates would cost the square of their number otherwise."""


class NearDuplicates(NamedTuple):
    """Records that are left out."""

    dropped: Numbers
    """`[m]`, their numbers, ascending."""
    kept: Numbers
    """`[m]`, the first kept record that each is near."""
    similarities: npt.NDArray[np.float64]
    """`[m]`, of the two."""


def exact_duplicates(keys: UInt64Array, numbers: Numbers) -> tuple[Numbers, Numbers]:
    """Return the duplicates among records, and for each the first record that it equals.

    Args:
        keys: `[n, k]`, equal for equal records.
        numbers: `[n]`, the records' numbers, ascending.
    """
    order = np.lexsort(keys.T)  # Stable, so that equal ones stay in order.
    ordered = keys[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[is_first][np.cumsum(is_first) - 1]
    is_duplicate = ~is_first
    duplicates, keepers = numbers[order[is_duplicate]], numbers[firsts[is_duplicate]]
    by_number = np.argsort(duplicates)
    return duplicates[by_number], keepers[by_number]


def near_candidates(bands: Iterable[UInt64Array], numbers: Numbers) -> Numbers:
    """Return the pairs `[m, 2]` of records that share the key of any band.

    The lower number of a pair comes first; pairs ascend by the higher one, then by the lower one.

    Args:
        bands: A `[n]` array of keys for each band, in the order of `numbers`.
        numbers: `[n]`, the records' numbers, ascending; fewer than 2^32.
    """
    assert len(numbers) < 1 << 32
    links = np.empty(0, np.uint64)
    for keys in bands:
        links = np.union1d(links, _links(keys))
    later, earlier = links >> np.uint64(32), links & np.uint64(0xFFFFFFFF)
    return numbers[np.stack([earlier, later], axis=1).astype(np.int64)]


def near_duplicates(
    candidates: Numbers, similarities: npt.NDArray[np.float64], threshold: float
) -> NearDuplicates:
    """Choose what is left out, given pairs in the order of `near_candidates`."""
    is_near = similarities >= threshold
    dropped: dict[int, tuple[int, float]] = {}
    for (earlier, later), similarity in zip(
        candidates[is_near].tolist(), similarities[is_near].tolist(), strict=True
    ):
        # All pairs with `earlier` as the higher number came before: whether it stays is settled.
        if earlier not in dropped and later not in dropped:
            dropped[later] = earlier, similarity
    return NearDuplicates(
        np.fromiter(dropped, np.int64, len(dropped)),
        np.array([kept for kept, _ in dropped.values()], np.int64),
        np.array([similarity for _, similarity in dropped.values()], np.float64),
    )


def _links(keys: UInt64Array) -> UInt64Array:
    """Return `later << 32 | earlier` for the pairs of places whose keys are equal."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    begins = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    # Only what shares a bucket is looked at from here on.
    (members,) = np.nonzero(~is_first)
    begins = begins[members]
    depth = members - begins
    parts = []
    for back in range(1, MAX_LINKS + 1):
        reaches = depth >= back
        if not reaches.any():
            break
        members, begins, depth = members[reaches], begins[reaches], depth[reaches]
        parts.append((order[members], order[members - back]))
    far = depth > MAX_LINKS
    members, begins, depth = members[far], begins[far], depth[far]
    for place in range(MAX_LINKS):
        reaches = depth - place > MAX_LINKS
        parts.append((order[members[reaches]], order[begins[reaches] + place]))
    later = np.concatenate([later for later, _ in parts]).astype(np.uint64)
    earlier = np.concatenate([earlier for _, earlier in parts]).astype(np.uint64)
    return later << np.uint64(32) | earlier
