"""The schedule at a billion records in a hundred thousand shards: memory, seeking, time per step.

    python benchmarks/schedule.py

Prints a markdown table; in parentheses is the processor's time, for a machine that others use too.
It writes index files of that size to a temporary folder, with no shards beside them: the schedule
looks at nothing else. Each column is measured in a process of its own, and in another one what
Python and numpy have allocated, for that slows it down.
"""

import argparse
import multiprocessing
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from largebatch.data.source import Source
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.index import SegmentTable, Shard, ShardIndex
from largebatch.world import part_of_rank

SHARES = (0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02)
"""Share of the shards that each source has."""
SEGMENTS_PER_SHARD, RECORDS_PER_SEGMENT = 10, 1000
SEGMENT_BYTES = 800_000
LANES = 64
STEPS = (0, 1_000, 1_000_000)
TIMED_STEPS = 20
READERS = 64
"""Loader processes over all ranks, of which each asks for its rows only."""
MIB = 2**20


def main() -> None:
    """Write the index files, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--global-batch", type=int, default=32_768)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_indexes(folder, options.shards)
        index_bytes = sum(file.stat().st_size for file in folder.rglob("*.json"))
        columns = {}
        for title, mixed in (("one_source", False), ("mixed", True)):
            columns[title] = in_new_process(measure, folder, options.global_batch, mixed)
            columns[title] |= in_new_process(measure_allocated, folder, options.global_batch, mixed)
    print(f"{index_bytes / MIB:,.0f} MiB of index.json.\n")
    print(f"| {' | '.join(['what', *columns])} |\n|{'---|' * (1 + len(columns))}")
    for row in columns["mixed"]:
        print(f"| {' | '.join([row, *(column[row] for column in columns.values())])} |")


def write_indexes(folder: Path, num_shards: int) -> None:
    """Write an index.json for each source."""
    ends = np.rint(np.cumsum(SHARES) / sum(SHARES) * num_shards).astype(int).tolist()
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        draw = np.random.default_rng(number)
        shards = []
        for shard in range(end - begin):
            columns = np.empty((4, SEGMENTS_PER_SHARD), np.int64)
            columns[0] = np.arange(SEGMENTS_PER_SHARD) * SEGMENT_BYTES
            columns[1] = SEGMENT_BYTES
            # Around 1,000, for a schedule might be quicker where all are alike.
            columns[2] = RECORDS_PER_SEGMENT + draw.integers(-20, 21, SEGMENTS_PER_SHARD)
            columns[3] = draw.integers(0, 2**32, SEGMENTS_PER_SHARD)
            shards.append(
                Shard(
                    f"shard-{shard:06d}.tar",
                    int(columns[2].sum()),
                    SEGMENTS_PER_SHARD * SEGMENT_BYTES,
                    draw.bytes(32).hex(),
                    SegmentTable(columns),
                )
            )
        source = folder / f"source{number}"
        source.mkdir()
        ShardIndex(tuple(shards)).save(source)


def in_new_process(function: Callable[..., dict[str, str]], *arguments: Any) -> dict[str, str]:
    """Return what a function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def load_sources(folder: Path) -> list[Source]:
    """Return the sources, as a run would have them."""
    return [
        Source.of_shards(
            source.name,
            [(f"{source}/{shard.file}", shard) for shard in ShardIndex.load(source).shards],
            {},
        )
        for source in sorted(folder.iterdir())
    ]


def build(sources: list[Source], global_batch: int, mixed: bool) -> Schedule:
    """Return the schedule; sources weigh the root of their sizes."""
    return Schedule(
        [SourceShape(source.name, source.segment_sizes) for source in sources],
        global_batch=global_batch,
        seed=0,
        lanes=LANES,
        mixed=mixed,
        size_exponent=0.5,
    )


def clock() -> npt.NDArray[np.float64]:
    """Return the time, and the processor's time that this process has had, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def in_s(duration: npt.NDArray[np.float64]) -> str:
    """Write a duration in seconds."""
    return f"{duration[0]:.2f} ({duration[1]:.2f})"


def in_ms(duration: npt.NDArray[np.float64]) -> str:
    """Write a duration in milliseconds."""
    return f"{1000 * duration[0]:.1f} ({1000 * duration[1]:.1f})"


def measure(folder: Path, global_batch: int, mixed: bool) -> dict[str, str]:
    """Return times, and the memory that the process has grown by."""
    process = psutil.Process()
    before = process.memory_info().rss
    begin = clock()
    sources = load_sources(folder)
    loaded = clock()
    schedule = build(sources, global_batch, mixed)
    built = clock()
    rows = range(global_batch)
    schedule.rows(0, rows)
    first_batch = clock()
    table = {
        "records": f"{schedule.num_records:,}",
        "shards": f"{sum(len(source.shards) for source in sources):,}",
        "segments": f"{sum(len(source.segments) for source in sources):,}",
        "load all index.json, s": in_s(loaded - begin),
        "build the schedule, s": in_s(built - loaded),
        "first batch of step 0, s": in_s(first_batch - built),
    }
    fresh = build(sources, global_batch, mixed)
    sought = clock()
    fresh.rows(STEPS[-1], rows)
    seek = clock() - sought
    table |= {
        f"first batch of step {STEPS[-1]:,}, s": in_s(seek),
        f"from nothing to step {STEPS[-1]:,}, s": in_s(built - begin + seek),
    }
    for name, part in (("", rows), (f", 1 of {READERS} readers", part_of_rank(len(rows), 5, 64))):
        for step in STEPS:
            fresh = build(sources, global_batch, mixed)
            fresh.rows(step, part)
            begin = clock()
            for later in range(step + 1, step + 1 + TIMED_STEPS):
                fresh.rows(later, part)
            per_step = (clock() - begin) / TIMED_STEPS
            table[f"a step from {step:,} on{name}, ms"] = in_ms(per_step)
    table["process grew by, MiB"] = f"{(process.memory_info().rss - before) / MIB:,.0f}"
    return table


def measure_allocated(folder: Path, global_batch: int, mixed: bool) -> dict[str, str]:
    """Return the memory that sources and schedule hold."""
    tracemalloc.start()
    sources = load_sources(folder)
    held_by_sources, max_while_loading = tracemalloc.get_traced_memory()
    schedule = build(sources, global_batch, mixed)
    for step in range(TIMED_STEPS):
        schedule.rows(step, range(global_batch))
    held, _ = tracemalloc.get_traced_memory()
    return {
        "allocated while loading, at most, MiB": f"{max_while_loading / MIB:,.0f}",
        "allocated by the sources, MiB": f"{held_by_sources / MIB:,.0f}",
        f"allocated by the schedule after {TIMED_STEPS} steps, MiB": (
            f"{(held - held_by_sources) / MIB:,.0f}"
        ),
    }


if __name__ == "__main__":
    main()
