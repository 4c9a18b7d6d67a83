"""How long ranks wait for the one with the most tokens, and what exchanging pairs would save.

    python benchmarks/balance.py --pairs debian-desc.jsonl.zst --tokenizer FOLDER

Arithmetic on real lengths, no training. Draws global batches, gives each rank as many pairs as the
others, and counts the tokens of each rank's distinct texts. All ranks wait for the one that has
most, so the step takes that rank's tokens; were they all equal, it would take the mean. `wait` is
how much longer the step is for it, `moved` the share of the pairs that would have to go to another
rank for equal parts (most tokens first, each to the rank that has fewest).
"""

import argparse
import heapq
import json
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

Lengths = npt.NDArray[np.int64]


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help=".jsonl.zst files")
    parser.add_argument("--tokenizer", required=True, help="folder or name")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[64, 512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    for path in options.pairs:
        tokens = pair_tokens(path, tokenizer, options.max_tokens, 2 * max(options.batch))
        spread = tokens.std() / tokens.mean()
        print(f"\n{path.name}: {tokens.mean():.0f} tokens a pair, spread {spread:.2f}\n")
        print("| batch | " + " | ".join(f"{ranks} ranks: wait, moved" for ranks in options.ranks))
        print("|---:" * (1 + len(options.ranks)) + "|")
        for batch in options.batch:
            cells = [cell(tokens, batch, ranks, options.draws) for ranks in options.ranks]
            print(f"| {batch:,} | " + " | ".join(cells) + " |")


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
    waits, moved = [], []
    for draw in range(draws):
        drawn = np.random.default_rng(draw).choice(tokens, batch)
        parts = np.array_split(drawn, ranks)
        sums = np.array([part.sum() for part in parts])
        waits.append(sums.max() / sums.mean() - 1)
        moved.append(share_moved(parts))
    return f"{np.mean(waits):.1%}, {np.mean(moved):.1%}"


def share_moved(parts: list[Lengths]) -> float:
    """Return the share of pairs that move: ranks above the mean give, to those with fewest."""
    total = sum(len(part) for part in parts)
    mean = sum(int(part.sum()) for part in parts) / len(parts)
    fewest = [(int(part.sum()), number) for number, part in enumerate(parts)]
    heapq.heapify(fewest)
    moved = 0
    for part in parts:
        excess = part.sum() - mean
        for length in np.sort(part)[::-1]:
            if length <= excess:
                excess -= length
                moved += 1
                held, number = heapq.heappop(fewest)
                heapq.heappush(fewest, (held + int(length), number))
    return moved / total


if __name__ == "__main__":
    main()
