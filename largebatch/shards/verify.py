"""Checks shards against their index."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from largebatch.errors import DataError
from largebatch.shards.ids import IdCounter, describe_repeated
from largebatch.shards.index import INDEX_NAME, Shard, ShardIndex
from largebatch.shards.scan import OnBytes, run_on_shards, scan_shard
from largebatch.shards.segment import read_segment


class _Found(NamedTuple):
    """What is in a shard."""

    problems: list[str]
    """What is wrong with it."""
    ids: IdCounter
    """The ids of its usable records."""


def verify(
    folder: Path,
    index: ShardIndex,
    *,
    fields: Mapping[str, str],
    workers: int = 1,
    on_bytes: OnBytes,
    on_note: Callable[[str], object] = lambda _: None,
) -> list[str]:
    """Check the shards in a folder against their index and return all that is wrong.

    Checks that each shard is there, that its size, checksums, number of records and segments are
    as indexed, that each record decodes (`fields` as in `record_from_mapping`) and has a query
    and a document, or a text where the index says so, and that no tar file is there that the index
    doesn't list. Records with the same kind of fault are one problem per shard, which tells their
    number and the first of them.
    `on_note` is called with what is no problem and should be known: that ids repeat.
    `workers` and `on_bytes` are as in `build_index`.
    """
    shards = {folder / shard.file: shard for shard in index.shards}
    tasks = {
        path: partial(_verify_shard, path, shard, dict(fields)) for path, shard in shards.items()
    }
    found = dict(run_on_shards(tasks, workers=workers, on_bytes=on_bytes))
    problems = [problem for path in shards for problem in found[path].problems]
    ids = IdCounter()
    for one in found.values():
        ids.add_all(one.ids)
    if (repeated := ids.repeated()).num_ids:
        on_note(describe_repeated(repeated, len(ids)))
    problems += [
        f"{path} is not listed in {INDEX_NAME}"
        for path in sorted(folder.glob("*.tar"))
        if path not in shards
    ]
    if not index.num_records:
        problems.append(f"{folder / INDEX_NAME} lists no records")
    return problems


def _verify_shard(path: Path, shard: Shard, fields: Mapping[str, str], on_bytes: OnBytes) -> _Found:
    ids = IdCounter()
    if not path.is_file():
        return _Found([f"{path} is missing"], ids)
    try:
        actual = scan_shard(path, on_bytes=on_bytes)
    except DataError as error:
        return _Found([str(error)], ids)
    problems = [
        f"{path}: {name} is {getattr(actual, name)}, and the index says {getattr(shard, name)}"
        for name in ("num_bytes", "sha256", "num_records")
        if getattr(actual, name) != getattr(shard, name)
    ]
    if not problems and (fault := _fault_of_segments(actual, shard)):
        problems.append(f"{path}: {fault}")
    # Records are read by what is there, so that their faults show even where the index is wrong.
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for segment in actual.segments:
        try:
            records = read_segment(
                str(path), segment, fields=fields, source="", texts=shard.holds_texts
            )
        except DataError as error:
            return _Found([*problems, str(error)], ids)
        for number in range(len(records)):
            try:
                ids.add(records.record(number).id)
            except DataError as error:
                first.setdefault(error.kind, str(error))
                counts[error.kind] += 1
    for kind, message in first.items():
        others = f" (and {counts[kind] - 1:,} more records)" if counts[kind] > 1 else ""
        problems.append(message + others)
    return _Found(problems, ids)


def _fault_of_segments(actual: Shard, indexed: Shard) -> str | None:
    now, then = actual.segments, indexed.segments
    same_cuts = np.array_equal(now.offsets, then.offsets) and np.array_equal(
        now.num_bytes, then.num_bytes
    )
    if same_cuts:
        if not np.array_equal(now.num_records, then.num_records):
            return "its segments hold other numbers of records than the index says"
        if ((then.crc32 >= 0) & (then.crc32 != now.crc32)).any():
            return "crc32 of its segments are others than the index says"
        return None
    # Another version may have cut the same records elsewhere; then all must fit end to end.
    now_ends, then_ends = now.offsets + now.num_bytes, then.offsets + then.num_bytes
    if (
        len(then)
        and then.offsets[0] == now.offsets[0]
        and np.array_equal(then.offsets[1:], then_ends[:-1])
        and then_ends[-1] == now_ends[-1]
    ):
        return None
    return "its segments in the index do not hold all of its records"
