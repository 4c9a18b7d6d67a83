"""`largebatch evaluate`: a model's scores on retrieval sets, beside BM25's."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from largebatch.cli.console import make_console, make_table
from largebatch.commands.encode import load_encoder
from largebatch.commands.output import make_folder_of
from largebatch.config import EvaluateConfig
from largebatch.files import write_text


def run(config: EvaluateConfig) -> None:
    """Score `config.model` on `config.sets`, print a table and write it to `config.output`."""
    from largebatch.evaluate.beir import load_retrieval_set
    from largebatch.evaluate.bm25 import evaluate_bm25
    from largebatch.evaluate.retrieval import evaluate_encoder

    sets = [
        load_retrieval_set(Path(folder), split=config.split, name=name)
        for name, folder in config.sets.items()
    ]
    output = None if config.output is None else make_folder_of(Path(config.output))
    encoder = load_encoder(config.model, device=config.device)
    results: dict[str, dict[str, Any]] = {}
    for retrieval_set in sets:
        result = results[retrieval_set.name] = {
            "documents": len(retrieval_set.corpus),
            "queries": len(retrieval_set.qrels),
        }
        result["model"] = evaluate_encoder(
            encoder,
            retrieval_set,
            truncate_dim=config.truncate_dim,
            tokens_per_chunk=config.batch_tokens,
            progress=True,
        )
        if config.bm25:
            result["bm25"] = evaluate_bm25(retrieval_set)
    short = "" if config.truncate_dim is None else f" at {config.truncate_dim} dimensions"
    print(f"{config.model}{short}, split {config.split}:")
    make_console().print(_table(results))
    if output is not None:
        whole = {
            "model": config.model,
            "truncate_dim": config.truncate_dim,
            "split": config.split,
            "sets": results,
        }
        write_text(output, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {output}")


def _table(results: dict[str, dict[str, Any]]) -> Table:
    from largebatch.evaluate.retrieval import METRICS

    headings = ("set", "documents", "queries", "by", "nDCG@10", "MRR@10", "Recall@10")
    table = make_table(*headings, texts=("by",))
    for name, result in results.items():
        for key, label in (("model", "model"), ("bm25", "BM25")):
            if key in result:
                table.add_row(
                    name,
                    f"{result['documents']:,}",
                    f"{result['queries']:,}",
                    label,
                    *(f"{result[key][metric]:.4f}" for metric in METRICS),
                )
    return table
