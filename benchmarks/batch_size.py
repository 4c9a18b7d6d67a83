"""What a large batch buys: the quickstart at several batch sizes, the same number of pairs seen.

    largebatch pairs code && python benchmarks/batch_size.py

Writes a table to benchmarks/results/batch_size.md and a plot beside it. Each run takes the
quickstart's model and data; the learning rate follows the root of the batch, as is usual for Adam
(arXiv 2205.10287), up to the quickstart's 5e-3 (twice that diverges at 4,096), and an eighth of the
steps is warm-up. Finished runs are kept in
runs/batch_size, so the command can be stopped and repeated.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCHES = (64, 512, 4096)
PAIRS = 122_880
LR_AT_1024 = 5e-3
RANKS = 2
"""Processes per run; they share out the work, and change nothing in the result."""
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/batch_size")


def main() -> None:
    """Train what is missing, and write table and plot."""
    for batch in BATCHES:
        train(batch)
    write_results()


def write_results() -> None:
    """Write table and plot of the finished runs."""
    rows = [read(batch) for batch in BATCHES]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "batch_size.md").write_text(table(rows), encoding="utf-8")
    draw(rows, RESULTS / "batch_size.png")
    print(table(rows))


def train(batch: int) -> None:
    """Train at one batch size, or go on with it."""
    folder = RUNS / str(batch)
    steps = PAIRS // batch
    options = [
        f"global_batch={batch}",
        f"max_steps={steps}",
        f"optim.lr={LR_AT_1024 * min(math.sqrt(batch / 1024), 1):.3g}",
        f"schedule.warmup_steps={max(steps // 8, 1)}",
        f"eval.every_steps={max(steps // 10, 1)}",
        f"logger.every_steps={max(steps // 30, 1)}",
        f"checkpoint.every_steps={max(steps // 2, 1)}",
        f"output_dir={folder}",
        f"name=batch-{batch}",
        "logger.wandb=disabled",
        "eval.bm25=true",
        f"hardware.ranks={RANKS}",
        "hardware.threads=1",
    ]
    command = [sys.executable, "-m", "largebatch", "train", "quickstart", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read(batch: int) -> dict[str, Any]:
    """Return the scores of a finished run over the pairs seen."""
    folder = RUNS / str(batch)
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    curve = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "eval/code-dev/ndcg@10" in entry:
            curve.append((entry["step"] * batch, entry["eval/code-dev/ndcg@10"]))
    return {"batch": batch, "steps": PAIRS // batch, "curve": curve, **result}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the scores as Markdown."""
    bm25 = rows[0]["before"]["eval/code-test/bm25/ndcg@10"]
    lines = [
        f"{PAIRS:,} pairs seen by each run, one seed. BM25's nDCG@10 on the test set: {bm25:.3f}.",
        "",
        "| batch | steps | dev nDCG@10 | test nDCG@10 | test MRR@10 | test Recall@10 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = row["trained"]
        lines.append(
            f"| {row['batch']:,} | {row['steps']:,} | {scores['eval/code-dev/ndcg@10']:.3f} | "
            f"{scores['eval/code-test/ndcg@10']:.3f} | {scores['eval/code-test/mrr@10']:.3f} | "
            f"{scores['eval/code-test/recall@10']:.3f} |"
        )
    return "\n".join([*lines, "", "Made by `python benchmarks/batch_size.py`.", ""])


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw dev nDCG@10 over the pairs seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colors = {64: "#c8641e", 512: "#2c8c56", 4096: "#2b6cb8"}
    label_y = -1.0
    for row in sorted(rows, key=lambda row: float(row["curve"][-1][1])):
        color = colors[row["batch"]]
        pairs, scores = zip(*row["curve"], strict=True)
        axes.plot(pairs, scores, marker="o", markersize=3.5, linewidth=2, color=color)
        axes.annotate(
            f"  batch {row['batch']:,}: {scores[-1]:.3f}",
            (pairs[-1], label_y := max(scores[-1], label_y + 0.03)),
            color=color,
            va="center",
        )
    axes.set(
        xlabel="pairs seen",
        ylabel="nDCG@10 on the dev set",
        title="The quickstart at three batch sizes, the same pairs seen",
        xlim=(0, PAIRS * 1.28),
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}K")
    axes.set_xticks(range(0, PAIRS + 1, 20_000))
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
