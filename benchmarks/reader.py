"""Reading pairs on one core: bytes on disk and records a second, side by side with others.

Seconds are those of the processor, which other work on the machine changes little.

    python benchmarks/reader.py --pairs FOLDER [--energon-python PYTHON]

FOLDER holds sets of pairs as NAME.jsonl.zst, {query, document, ...} a line. Each set is written as
tar shards in both layouts and as parquet; then every reader goes through all sets from begin to
end, in turn, several times. Files are in the page cache. What a reader gives:

- ours: `Record`s, checked (UTF-8, fields, lengths, checksums of the bytes);
- plain webdataset: dicts, `wds.WebDataset(url).decode()`, on the `samples` layout;
- datasets: dicts, from the arrow file that it makes of parquet once, and from parquet as a stream;
- megatron-energon: its samples, of the `samples` layout too, through a loader without
  workers. It runs in an environment of its own, whose python is named on the command line.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

LAYOUTS = ("samples", "packed")


def main() -> None:
    """Build the sets, measure every reader and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=Path, required=True, help="folder with NAME.jsonl.zst")
    parser.add_argument("--most", type=int, default=20_000, help="records of each set")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--energon-python", help="python of an environment with megatron-energon")
    options = parser.parse_args()
    # One core, for this process and those that it starts.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        counts = build(options.pairs, folder, most=options.most)
        for name, count in counts.items():
            print(f"{name:14s} {count:>8,} records", flush=True)
        print_bytes(folder)
        measure(folder, sum(counts.values()), runs=options.groups, energon=options.energon_python)


def build(pairs: Path, folder: Path, *, most: int) -> dict[str, int]:
    """Write each set as shards in both layouts and as parquet; return their records."""
    import pyarrow as pa
    from pyarrow import parquet

    from largebatch.shards.records import record_from_mapping
    from largebatch.shards.write import ShardWriter

    texts = [(name, pa.string()) for name in ("query", "document", "source", "id")]
    schema = pa.schema([*texts, ("negatives", pa.list_(pa.string()))])
    counts = {}
    for path in sorted(pairs.glob("*.jsonl.zst")):
        name = path.name.removesuffix(".jsonl.zst")
        records = [
            record_from_mapping(row, fields={}, source=name, default_id=str(i), where=path.name)
            for i, row in enumerate(rows_of(path, most))
        ]
        records = [r for r in records if r.query.strip() and r.document.strip()]
        counts[name] = len(records)
        for layout in LAYOUTS:
            with ShardWriter(folder / layout / name, records_per_shard=10_000, layout=layout) as w:
                for record in records:
                    w.write(record)
        table = pa.Table.from_pylist([record._asdict() for record in records], schema)
        (folder / "parquet").mkdir(exist_ok=True)
        parquet.write_table(table, folder / "parquet" / f"{name}.parquet", compression="zstd")
    return counts


def rows_of(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """Yield the first rows of a compressed jsonl file."""
    with zstandard.open(path, "rb") as file:
        for i, line in enumerate(io.TextIOWrapper(file, encoding="utf-8")):
            if i == most:
                return
            yield json.loads(line)


def print_bytes(folder: Path) -> None:
    """Print what each way of keeping the pairs takes on disk."""
    print("\n| kept as | bytes on disk |\n|---|---|")
    for name, pattern in [
        ("shards, samples", "samples/*/*.tar"),
        ("shards, packed", "packed/*/*.tar"),
        ("parquet, zstd", "parquet/*.parquet"),
    ]:
        num_bytes = sum(path.stat().st_size for path in folder.glob(pattern))
        print(f"| {name} | {num_bytes / 1e6:.1f} MB |")


def measure(folder: Path, num_records: int, *, runs: int, energon: str | None) -> None:
    """Run every reader in turn, several times, and print records a second."""
    readers: dict[str, Callable[[], int]] = {
        "ours, packed": lambda: read_ours(folder / "packed"),
        "ours, samples": lambda: read_ours(folder / "samples"),
        "plain webdataset": lambda: read_webdataset(folder / "samples"),
        "datasets, arrow": arrow_reader(folder),
        "datasets, parquet stream": lambda: read_parquet_stream(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(runs):
        for name, reader in readers.items():
            begin = time.process_time()
            count = reader()
            seconds[name].append(time.process_time() - begin)
            assert count == num_records, (name, count, num_records)
        if energon is not None:
            seconds.setdefault("megatron-energon", []).append(run_energon(folder, energon))
    plain = statistics.median(seconds["plain webdataset"])
    print("\n| reader | records/s, median | range | to plain webdataset |\n|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"| {name} | {num_records / median:,.0f} | {num_records / max(times):,.0f} to "
            f"{num_records / min(times):,.0f} | {plain / median:.1f}x |"
        )


def read_ours(folder: Path) -> int:
    """Read and decode every record as training does, segment by segment."""
    from largebatch.shards.find import resolve_source
    from largebatch.shards.segment import read_segment

    count = 0
    for source in sorted(folder.iterdir()):
        for url, shard in resolve_source([str(source)]):
            for segment in shard.segments:
                records = read_segment(
                    url, segment, fields={}, source=source.name, max_chars=200_000
                )
                for number in range(len(records)):
                    records.record(number)
                count += len(records)
    return count


def read_webdataset(folder: Path) -> int:
    """Read the same shards as webdataset's documentation does."""
    import webdataset as wds

    urls = [str(path) for path in sorted(folder.glob("*/*.tar"))]
    return sum(1 for _ in wds.WebDataset(urls, shardshuffle=False).decode())


def arrow_reader(folder: Path) -> Callable[[], int]:
    """Let `datasets` make its arrow file, which is not measured, and return what reads that."""
    import datasets

    files = [str(path) for path in sorted((folder / "parquet").iterdir())]
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(folder / "cache")
    )
    return lambda: sum(1 for _ in loaded)


def read_parquet_stream(folder: Path) -> int:
    """Read parquet by `datasets` without the arrow file."""
    import datasets

    files = [str(path) for path in sorted((folder / "parquet").iterdir())]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return sum(1 for _ in stream)


def run_energon(folder: Path, python: str) -> float:
    """Read the shards by megatron-energon, in a process of its environment; return seconds."""
    script = Path(__file__).with_name("reader_energon.py")
    command = [python, str(script), str(folder / "samples")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"megatron-energon failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
