"""What a run tells a person before its first step and after its last."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largebatch.evaluate.retrieval import METRICS

_HEADINGS = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@10": "Recall@10"}


def print_lines(lines: Sequence[str]) -> None:
    """Print lines as they are."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for line in lines:
        console.print(line)


def print_result(result_file: Path, folder: Path) -> None:
    """Print the scores in evaluation.json, and where the model is."""
    result = json.loads(result_file.read_text(encoding="utf-8"))
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


def _scores(values: Mapping[str, Any], prefix: str) -> list[str]:
    found = [values.get(f"{prefix}/{metric}") for metric in METRICS]
    return [] if None in found else [f"{value:.3f}" for value in found]
