"""How long ranks wait for the one with the most tokens, and what exchanging pairs saves.

    python benchmarks/balance.py --pairs debian-desc.jsonl.zst --tokenizer FOLDER

Arithmetic on real lengths, no training. Draws global batches and gives each rank as many pairs as
the others. All ranks wait for the one that has the most tokens; were they equal, the step would
take the mean. `wait` is how much longer it is for that, `left` the same after the exchange, and
`moved` the share of the pairs that go to another rank for it (largebatch/step/balance.py). At the
end, how long an exchange takes: processes of this machine, gloo, each with its own part.
"""

import argparse
import json
import socket
import time
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoTokenizer

from largebatch.batch import Texts
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs, exchange_pairs, new_owners

Lengths = npt.NDArray[np.int64]


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help=".jsonl.zst files")
    parser.add_argument("--tokenizer", required=True, help="folder or name")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[64, 512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    for path in options.pairs:
        tokens = pair_tokens(path, tokenizer, options.max_tokens, 2 * max(options.batch))
        spread = tokens.std() / tokens.mean()
        print(f"\n{path.name}: {tokens.mean():.0f} tokens a pair, spread {spread:.2f}\n")
        titles = [f"{ranks} ranks: wait, left, moved" for ranks in options.ranks]
        print(f"| batch | {' | '.join(titles)} |")
        print("|---:" * (1 + len(options.ranks)) + "|")
        for batch in options.batch:
            cells = [cell(tokens, batch, ranks, options.draws) for ranks in options.ranks]
            print(f"| {batch:,} | {' | '.join(cells)} |")
    print("\nAn exchange takes:\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for size in options.processes:
        multiprocessing.spawn(exchange, (size, tokens, max(options.batch), port), nprocs=size)


def pair_tokens(path: Path, tokenizer: object, most: list[int], number: int) -> Lengths:
    """Return the tokens of each pair."""
    import zstandard

    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, number)]
    total = np.zeros(len(records), np.int64)
    for side, longest in zip(("query", "document"), most, strict=True):
        texts = [record[side] for record in records]
        ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]  # type: ignore[operator]
        total += [len(one) for one in ids]
    return total


def cell(tokens: Lengths, batch: int, ranks: int, draws: int) -> str:
    """Return means over drawn batches."""
    waits, left, moved = [], [], []
    for draw in range(draws):
        drawn = np.random.default_rng(draw).choice(tokens, batch)
        parts = np.array_split(drawn, ranks)
        owners = new_owners(parts)
        sums = np.array([part.sum() for part in parts])
        after = np.bincount(np.concatenate(owners), weights=drawn, minlength=ranks)
        waits.append(sums.max() / sums.mean() - 1)
        left.append(after.max() / sums.mean() - 1)
        stayed = sum(int((new == rank).sum()) for rank, new in enumerate(owners))
        moved.append(1 - stayed / batch)
    return f"{np.mean(waits):.1%}, {np.mean(left):.1%}, {np.mean(moved):.1%}"


def exchange(rank: int, size: int, tokens: Lengths, batch: int, port: int) -> None:
    """Time exchanges of one batch, on one of `size` processes."""
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    collectives = Collectives()
    own = np.array_split(np.random.default_rng(0).choice(tokens, batch), size)[rank]
    documents = Texts(np.zeros(own.sum() - len(own), np.int32), own.astype(np.int32) - 1)
    queries = Texts(np.zeros(len(own), np.int32), np.ones(len(own), np.int32))
    ids = np.zeros(len(own), np.int64)
    pairs = Pairs(queries, documents, Texts.from_lists([]), None, ids)
    seconds = []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        exchange_pairs(pairs, collectives)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(f"{size} ranks, {batch:,} pairs: {1000 * np.median(seconds):.1f} ms", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
