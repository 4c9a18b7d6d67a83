"""De-duplication of real pairs against real evaluation sets: counts, seconds, memory, disk.

    python benchmarks/dedup.py --pairs FOLDER --evaluation FOLDER --workers 1 2 --repeats 3

`--pairs` holds one file per source that `largebatch shard` reads; `--evaluation` one BEIR folder
per set. Shards are written to a temporary folder first. Each run is a process of its own. CPU
seconds are told beside those of the clock, since other work may share the machine: they are of the
first process, which with one worker is all of it.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from largebatch.config import DedupConfig, ShardConfig
from largebatch.curate.convert import convert
from largebatch.curate.dedup import deduplicate
from largebatch.curate.rows import find_inputs


def main() -> None:
    """Print a row for each number of workers, then the counts of the last run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=Path, help="shards of the sources; prints a JSON line")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.evaluation, options.workers[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        shards = Path(temporary)
        for path in sorted(path for path in options.pairs.iterdir() if path.is_file()):
            name = path.name.partition(".")[0]
            config = ShardConfig(input=[str(path)], output_dir=str(shards / name))
            inputs = find_inputs(config.input)
            convert(config, inputs, on_bytes=lambda _: None, on_row=lambda: None)
        for workers in options.workers:
            for _ in range(options.repeats):
                run = in_process(shards, options.evaluation, workers)
                stages = ", ".join(
                    f"{name} {clock:.1f} ({cpu:.1f})"
                    for name, (clock, cpu) in run["seconds"].items()
                )
                clock, cpu = map(sum, zip(*run["seconds"].values(), strict=True))
                print(
                    f"{workers} workers: {run['records']:,} pairs in {clock:.1f} s "
                    f"(CPU {cpu:.1f}), "
                    f"{run['records'] / clock:,.0f} pairs/s (by CPU {run['records'] / cpu:,.0f}); "
                    f"peak {run['peak_mib']:,.0f} MiB (largest worker {run['worker_mib']:,.0f} "
                    f"MiB); {stages}"
                )
        print(json.dumps({key: run[key] for key in ("compared", "sources")}, indent=1))


def in_process(shards: Path, evaluation: Path, workers: int) -> dict[str, Any]:
    """Measure in a process of its own, since a peak of memory can't be taken back."""
    command: Sequence[str] = [
        *(sys.executable, __file__, "--one", str(shards), "--pairs", str(shards)),
        *("--evaluation", str(evaluation), "--workers", str(workers)),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure(shards: Path, evaluation: Path, workers: int) -> dict[str, object]:
    """De-duplicate once; seconds of each stage, counts, and peaks of memory."""
    seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(title: str, total: int) -> Iterator[Callable[[int], None]]:
        del total
        clock, cpu = time.perf_counter(), time.process_time()
        yield lambda _: None
        seconds[title] = time.perf_counter() - clock, time.process_time() - cpu

    sources = {path.name: [str(path)] for path in sorted(shards.iterdir())}
    sets = {path.name: str(path) for path in sorted(evaluation.iterdir()) if path.is_dir()}
    with tempfile.TemporaryDirectory() as output:
        config = DedupConfig(sources=sources, output_dir=output, evaluation_sets=sets)
        report = deduplicate(config, num_workers=workers, stage=stage)
    return {
        "seconds": seconds,
        "records": sum(counts.records for counts in report.sources),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "compared": report.compared,
        "sources": [
            {
                "name": counts.name,
                "records": counts.records,
                **counts.dropped(),
                "written": counts.written,
                "repeated_queries": counts.repeated_queries,
                "repeated_documents": counts.repeated_documents,
                "contaminated_by": counts.contaminated,
                "exact_with": counts.exact,
                "near_with": counts.near,
            }
            for counts in report.sources
        ],
    }


if __name__ == "__main__":
    main()
