"""Several sources through the quickstart's model: the realized mix, the wait, and that it trains.

    python benchmarks/mixture.py --pairs FOLDER --eval FOLDER

FOLDER with pairs: NAME.jsonl.zst files, each a source. FOLDER with evaluation sets: a folder in
BEIR layout each. Shards and runs go to runs/mixture, and are kept for the next time. Trains once on
batches from one source and once on mixed batches, and prints a table for
benchmarks/results/data.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

WORK = Path("runs/mixture")


def main() -> None:
    """Write the shards, train twice, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--size-exponent", type=float, default=0.5)
    arguments = parser.parse_args()
    sources = [shard(file) for file in sorted(arguments.pairs.glob("*.jsonl.zst"))]
    sets = [folder for folder in sorted(arguments.eval.iterdir()) if folder.is_dir()]
    for batches in ("one_source", "mixed"):
        folder = WORK / batches
        largebatch(
            "train",
            "quickstart",
            "data=custom",
            "eval=none",
            *[f"data.sources.{source.name}.urls=[{source}]" for source in sources],
            *[f"+eval.test.{folder.name.replace('-', '_')}={folder}" for folder in sets],
            f"data.batches={batches}",
            f"data.size_exponent={arguments.size_exponent}",
            f"max_steps={arguments.steps}",
            f"output_dir={folder}",
            f"name={batches}",
            "logger.wandb=disabled",
        )
        print(report(folder, batches))


def shard(file: Path) -> Path:
    """Turn a file of pairs into shards, if that was not done before."""
    folder = WORK / "shards" / file.name.partition(".")[0]
    if not (folder / "index.json").exists():
        largebatch("shard", f"input=[{file}]", f"output_dir={folder}")
    return folder


def report(folder: Path, batches: str) -> str:
    """Return what a run did, as Markdown."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for line in lines if "train/loss" in (entry := json.loads(line))]
    last = entries[-1]
    names = [key.split("/")[1] for key in last if key.startswith("mix/") and key.endswith("share")]
    rows = [
        f"| {name} | {last[f'mix/{name}/wanted']:.2%} | {last[f'mix/{name}/share']:.2%} "
        f"| {last[f'mix/{name}/epoch']:.2f} |"
        for name in names
    ]
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    retrieval = [
        f"| {key.split('/')[1]} | {scores['before'][key]:.3f} | {value:.3f} |"
        for key, value in scores["trained"].items()
        if key.endswith("ndcg@10")
    ]
    waits = [entry["train/data_wait_share"] for entry in entries[1:]]
    return "\n".join(
        [
            f"\n`data.batches={batches}`: {len(entries)} steps, loss {entries[0]['train/loss']:.2f}"
            f" -> {last['train/loss']:.2f}; share of a step spent waiting for data: median "
            f"{median(waits):.2%}, worst {max(waits):.2%} (after the first); "
            f"{median(entry['train/pairs_per_s'] for entry in entries):.0f} pairs/s.\n",
            "| source | wanted | realized | epochs |\n|---|---|---|---|",
            *rows,
            "\n| evaluation set | nDCG@10 before | trained |\n|---|---|---|",
            *retrieval,
        ]
    )


def largebatch(*arguments: str) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "largebatch", *arguments], check=True)


if __name__ == "__main__":
    main()
