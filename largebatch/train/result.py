"""What a run came to: `evaluation.json`, which stands for its end, and the table on the console."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from largebatch.evaluate.retrieval import METRICS
from largebatch.files import write_text
from largebatch.train.loggers import METRICS_FILE, read_metrics
from largebatch.train.report import print_lines

RESULT_FILE = "evaluation.json"
_HEADINGS = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@10": "Recall@10"}


class Result(NamedTuple):
    """How a run ended."""

    max_steps: int
    """Steps that it took."""
    step: int
    """The one whose weights are exported."""
    trained: dict[str, float]
    """Their scores, by metric."""


def is_over(folder: Path, max_steps: int) -> bool:
    """Whether a run of so many steps has left its result and model in a folder."""
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return result["max_steps"] == max_steps and (folder / "model").is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return False  # it is written anew


def write_result(folder: Path, result: Result) -> None:
    """Write evaluation.json, with the scores before the first step, and print both.

    Raises:
        UserError: It can't be written.
    """
    content = {
        "max_steps": result.max_steps,
        "step": result.step,
        "before": _at_step_0(folder),
        "trained": result.trained,
    }
    write_text(folder / RESULT_FILE, json.dumps(content, indent=1))
    print_result(folder)


def print_result(folder: Path) -> None:
    """Print the scores in evaluation.json, and where the model is."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    before, trained = result["before"], result["trained"]
    console = Console()
    names = list(dict.fromkeys(key.split("/")[1] for key in trained))
    if names:
        table = Table(title=f"retrieval after {result['step']} of {result['max_steps']} steps")
        table.add_column("set")
        table.add_column("model")
        for metric in METRICS:
            table.add_column(_HEADINGS[metric], justify="right")
        for name in names:
            rows = {
                "before training": _scores(before, f"eval/{name}"),
                "BM25": _scores(before, f"eval/{name}/bm25"),
                "trained": _scores(trained, f"eval/{name}"),
            }
            for label, scores in rows.items():
                if scores:
                    table.add_row(name, label, *scores, style="bold" if label == "trained" else "")
            table.add_section()
        console.print(table)
    print_lines(
        [
            f"model:   {folder / 'model'} (for Encoder.from_pretrained and SentenceTransformer)",
            f"metrics: {folder / 'metrics.jsonl'}",
            *([f"plots:   {folder / 'plots'}"] if (folder / "plots").is_dir() else []),
        ]
    )


def _at_step_0(folder: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    for entry in read_metrics(folder / METRICS_FILE):
        if entry["step"] == 0:
            values |= {name: value for name, value in entry.items() if name != "step"}
    return values


def _scores(values: Mapping[str, Any], prefix: str) -> list[str]:
    found = [values.get(f"{prefix}/{metric}") for metric in METRICS]
    return [] if None in found else [f"{value:.3f}" for value in found]
