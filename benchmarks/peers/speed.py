"""Pairs per second and peak memory of one contrastive step, ours beside the peers'.

    python benchmarks/peers/speed.py --pairs arxiv.jsonl.zst --batch 1024 --gradcache-path GradCache

Same pairs, model, precision, batch and threads for all; no dropout, so that every contender has the
same gradient, which is compared (the quickstart's model has none; masks would depend on the
chunking); and no masking of duplicates, which the peers don't do. Every measurement is a process of
its own: it loads model and tokenized pairs, takes a small step to warm up, then `--steps` whole
ones, the last of which is timed. Rounds are interleaved: each contender once, then again. `tuned`
contenders try their candidates in the first round and go on with the fastest. What a data loader
does beforehand is not timed (tokenizing; padding, for the peers); chunking is. CPU s is the
processor time of all threads, which other work on the machine disturbs less.

Memory is the peak beyond what the process held before its first step. Ratios are to the first
contender. At the default options that is 15 processes in the first round and 7 in each other; each
starts in about 10 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MINI_BATCHES = ("8", "16", "64", "128", "tokens:2048", "tokens:4096")
"""Candidates of the tuned contenders: texts, or tokens, per mini-batch."""


def main() -> None:
    """Measure all contenders at each batch size and print a table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="a .jsonl.zst, or their folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument(
        "--model", default="quickstart", help="quickstart, bert-base, minilm or a model folder"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of a process; the last one counts")
    parser.add_argument("--mini-batches", nargs="+", default=MINI_BATCHES)
    parser.add_argument(
        "--keep", nargs="+", default=["none", "all"], help="of largebatch: KEEP or KEEP@GIB"
    )
    parser.add_argument("--tokens-per-chunk", default="2048", help="of largebatch")
    parser.add_argument("--plain-up-to", type=int, default=1024, help="largest plain full batch")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[32, 80])
    parser.add_argument("--gradcache-path", help="a clone of github.com/luyug/GradCache")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    parser.add_argument("--output", type=Path, help="also add the tables to this file")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batch:
            prepare(Path(folder), batch, options)
            text = table(compare(Path(folder), batch, options), batch, options)
            print(text, flush=True)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(text + "\n\n")


def contender_candidates(batch: int, options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Return each contender's candidates: what `step.py` is told, fastest wins."""
    texts = [size for size in options.mini_batches if not size.startswith("tokens:")]
    found = {
        "sentence-transformers, default": [["sentence_transformers", "32"]],
        "sentence-transformers, tuned": [
            ["sentence_transformers", size] for size in options.mini_batches
        ],
        "GradCache, 32": [["gradcache", "32"]],
        "GradCache, tuned": [["gradcache", size] for size in texts],
    }
    if batch <= options.plain_up_to:
        found["plain full batch"] = [["plain", ""]]
    for keep in options.keep:
        found[f"largebatch, keep={keep}"] = [["largebatch", f"{keep}:{options.tokens_per_chunk}"]]
    if options.gradcache_path is None:
        found = {name: value for name, value in found.items() if not name.startswith("GradCache")}
    if options.only:
        found = {
            name: value for name, value in found.items() if name.startswith(tuple(options.only))
        }
    return found


def prepare(folder: Path, batch: int, options: argparse.Namespace) -> None:
    """Write model, tokenized pairs and settings, which every process reads."""
    import step

    pairs = step.read_pairs(options.pairs, batch)
    encoder = step.make_encoder(options.model, pairs, options.max_tokens)
    encoder.save_pretrained(folder / "model")
    arrays = {}
    for side, texts in zip(("query", "document"), zip(*pairs, strict=True), strict=True):
        tokens, _ = encoder.tokenize(list(texts), side=side)
        arrays[f"{side}_tokens"], arrays[f"{side}_lengths"] = tokens.tokens, tokens.lengths
    np.savez(folder / "pairs.npz", **arrays)
    settings = {key: getattr(options, key) for key in ("precision", "device", "threads", "steps")}
    settings["gradcache_path"] = options.gradcache_path
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def compare(folder: Path, batch: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure all contenders, round by round."""
    # A tuned contender may have no candidate among --mini-batches.
    candidates = {name: c for name, c in contender_candidates(batch, options).items() if c}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    chosen: dict[str, list[str]] = {}
    for number in range(options.rounds):
        for name, choices in candidates.items():
            if number == 0:
                tried = [(measure(folder, choice, name), choice) for choice in choices]
                best, chosen[name] = min(tried, key=lambda run: run[0].get("seconds", np.inf))
                runs[name].append(best)
            elif "seconds" in runs[name][0]:
                runs[name].append(measure(folder, chosen[name], name))
    return {
        name: summary(results, chosen[name], gradient_file(folder, name, chosen[name]))
        for name, results in runs.items()
    }


def measure(folder: Path, choice: list[str], name: str) -> dict[str, Any]:
    """Take one step in a new process; on failure return the reason."""
    gradient = gradient_file(folder, name, choice)
    command = [sys.executable, str(FOLDER / "step.py"), str(folder), *choice, str(gradient)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(f"{name} {choice}: {lines[-1]}", file=sys.stderr, flush=True)
        return {"error": lines[-1][:120]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{name} {choice}: {result['seconds']:.2f} s, {result['peak_mib']:.0f} MiB",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return result


def gradient_file(folder: Path, name: str, choice: list[str]) -> Path:
    """Return where a contender's process leaves its gradient."""
    return folder / f"{name} {choice[1].replace(':', '_')}.npy"


def summary(results: list[dict[str, Any]], choice: list[str], gradient: Path) -> dict[str, Any]:
    """Return medians over rounds."""
    good = [result for result in results if "seconds" in result]
    if not good:
        return {"error": results[0]["error"]}
    seconds = [result["seconds"] for result in good]
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(result["cpu_seconds"] for result in good),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "peak_mib": statistics.median(result["peak_mib"] for result in good),
        "loss": good[-1]["loss"],
        "setting": choice[1],
        "gradient": np.load(gradient),
        "num_tokens": good[-1]["num_tokens"],
    }


def table(rows: dict[str, dict[str, Any]], batch: int, options: argparse.Namespace) -> str:
    """Return the comparison as Markdown; ratios and gradients are relative to the first row."""
    import installed
    import torch

    good = {name: row for name, row in rows.items() if "seconds" in row}
    if not good:
        return "\n".join(f"{name}: {row['error']}" for name, row in rows.items())
    first_name, first = next(iter(good.items()))
    names = ["sentence-transformers"] + (["GradCache"] if options.gradcache_path else [])
    installed.add_gradcache(options.gradcache_path)
    versions = ", ".join(f"{name} {installed.version(name)}" for name in names)
    lines = [
        f"{batch:,} pairs of {options.pairs.name} ({first['num_tokens']:,} tokens), model "
        f"{options.model}, {options.precision}, {options.device}, {options.threads} threads, "
        f"{options.rounds} rounds; torch {torch.__version__}, {versions}.",
        "",
        "| contender | setting | s/step | spread | CPU s | pairs/s | ratio | peak MiB | "
        "memory ratio | loss | gradient's error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if name not in good:
            lines.append(f"| {name} | {row['error']} |" + " |" * 9)
            continue
        error = np.linalg.norm(row["gradient"] - first["gradient"])
        error /= np.linalg.norm(first["gradient"])
        lines.append(
            f"| {name} | {row['setting']} | {row['seconds']:.2f} | {row['spread']:.0%} | "
            f"{row['cpu_seconds']:.2f} | "
            f"{batch / row['seconds']:.1f} | {first['seconds'] / row['seconds']:.2f} | "
            f"{row['peak_mib']:.0f} | {row['peak_mib'] / first['peak_mib']:.2f} | "
            f"{row['loss']:.5f} | {error:.1e} |"
        )
    return "\n".join([*lines, "", f"Ratios and gradient's error are to {first_name}."])


if __name__ == "__main__":
    main()
