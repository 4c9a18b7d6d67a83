"""Everything that only a GPU can tell, in one go and within 25 minutes.

    make gpu            # or: largebatch pairs code && python benchmarks/gpu.py

1. the tests that need one, `pytest -m gpu`;
2. `largebatch bench`: BERT-base in bf16 at 32,768 pairs, keep none and auto, packed and padded;
3. the peers on the same model, bf16, at 4,096 pairs of Python code.

Writes benchmarks/results/gpu_NAME_DATE.md, whatever came of each part, and exits with 1 if one of
them failed. `--trial` does the same on a CPU with a tiny model, to try this script.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAIRS = Path("data/code/train")
TINY = {
    "backbone.config.hidden_size": 64,
    "backbone.config.num_hidden_layers": 2,
    "backbone.config.num_attention_heads": 2,
    "backbone.config.intermediate_size": 128,
}


class Part(NamedTuple):
    """What came of one part."""

    seconds: float
    failed: bool
    text: str
    """Markdown."""


def main() -> None:
    """Run all parts and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trial", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--gradcache-path", help="a clone of github.com/luyug/GradCache")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/gpu_…md")
    options = parser.parse_args()
    if not PAIRS.is_dir():
        raise SystemExit(f"{PAIRS} is not there; `largebatch pairs code` writes it")

    name = device_name(trial=options.trial)
    parts = {
        "Tests": run_tests(trial=options.trial),
        "BERT-base" if not options.trial else "Tiny model": run_bench(trial=options.trial),
        "Beside the peers": run_peers(trial=options.trial, gradcache=options.gradcache_path),
    }
    today = datetime.datetime.now(tz=datetime.UTC).date()
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = options.output or RESULTS / f"gpu_{short}_{today}.md"
    file.write_text(page(name, today, parts), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
    print(f"written     {file}")
    sys.exit(any(part.failed for part in parts.values()))


def device_name(*, trial: bool) -> str:
    """Return what the maker calls the GPU.

    It is asked for in another process: tests fork, and a process that holds a GPU can't.
    """
    if trial:
        return "trial on a CPU"
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"torch sees no GPU: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def run_tests(*, trial: bool) -> Part:
    """Run the suite for GPUs; in a trial those of its tests that stand in on a CPU."""
    chosen = ["tests/gpu"] if trial else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-n", "0", *chosen]
    done, seconds = timed(command)
    lines = done.stdout.strip().splitlines()
    told = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return Part(seconds, done.returncode != 0, fenced([*told, *lines[-1:]]))


def run_bench(*, trial: bool) -> Part:
    """Run `largebatch bench` on padded and on packed texts."""
    model: dict[str, Any] = {
        "backbone.config.hidden_dropout_prob": 0.0,
        "backbone.config.attention_probs_dropout_prob": 0.0,  # which the packed kernel lacks
        "text.query_max_tokens": 32,
        "text.document_max_tokens": 128,
    }
    model |= TINY if trial else {"hardware": "gpu", "tokens_per_chunk": 65536}
    lines, failed, since = [], False, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for packing in ("auto", "off"):
            command = [
                sys.executable, "-m", "largebatch", "bench", "synthetic=true", "steps=2",
                f"batches=[{256 if trial else 32768}]",
                f"keeps=[none,{'all' if trial else 'auto'}]",
                *(f"{option}={value}" for option, value in model.items()),
                f"backbone.packing={packing}", f"bench_dir={folder}/{packing}",
            ]  # fmt: skip
            done, _ = timed(command)
            failed |= done.returncode != 0
            results = Path(folder, packing, "results.json")
            if results.is_file():
                found = json.loads(results.read_text(encoding="utf-8"))
                failed |= not all(case["measured"] for case in found["cases"])
                lines += [bench_row(packing, case) for case in found["cases"]]
            else:
                lines.append(f"| {packing} | failed: {last_line(done)} |" + " |" * 9)
    head = [
        "| packing | keep | chunk | pairs/s | tokens/s | of peak | useful, of matmul | "
        "paid, of matmul | forwards | GiB | padding |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    text = "\n".join([
        *head, *lines, "",
        "Made-up texts, 32 and 128 tokens at most. Useful: 3 forward passes and no padding; paid: "
        "all that was computed; of matmul: of the rate measured on the model's own shapes.",
    ])  # fmt: skip
    return Part(time.perf_counter() - since, failed, text)


def bench_row(packing: str, case: dict[str, Any]) -> str:
    """Return a row of the table."""
    keep = case["case"]["keep"]
    if not case["measured"]:
        return f"| {packing} | {keep} | failed: {case['reason']} |" + " |" * 8
    get = case["figures"].__getitem__
    peak = "-" if get("mfu") is None else f"{get('mfu'):.1%}"
    return (
        f"| {packing} | {keep} | {get('tokens_per_chunk'):,} | {get('pairs_per_s'):,.0f} | "
        f"{get('tokens_per_s'):,.0f} | {peak} | {get('useful_share_of_matmul'):.0%} | "
        f"{get('paid_share_of_matmul'):.0%} | {get('forwards'):.2f} | {get('memory_gib'):.2f} | "
        f"{get('padding_share'):.1%} |"
    )


def run_peers(*, trial: bool, gradcache: str | None) -> Part:
    """Run peers/speed.py on pairs of Python code."""
    batch = 128 if trial else 4096
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "code.jsonl.zst"
        write_pairs(pairs, batch)
        table = Path(folder) / "table.md"
        command = [
            sys.executable, str(ROOT / "benchmarks/peers/speed.py"), "--pairs", str(pairs),
            "--batch", str(batch), "--rounds", "2", "--steps", "3", "--plain-up-to", "0",
            "--model", "quickstart" if trial else "bert-base",
            "--device", "cpu" if trial else "cuda",
            "--precision", "float32" if trial else "bf16",
            "--max-tokens", "32", "128", "--tokens-per-chunk", "2048" if trial else "65536",
            "--mini-batches", *(["64"] if trial else ["128", "512", "tokens:32768"]),
            "--keep", "none", "all" if trial else "auto",
            *(["--gradcache-path", gradcache] if gradcache else []),
            "--output", str(table),
        ]  # fmt: skip
        done, seconds = timed(command)
        written = table.is_file()
        text = table.read_text(encoding="utf-8").strip() if written else fenced([last_line(done)])
    return Part(seconds, done.returncode != 0 or not written, text)


def write_pairs(file: Path, number: int) -> None:
    """Write the first pairs of the code set as one compressed file of JSON lines."""
    import zstandard

    from largebatch.shards.find import resolve_source
    from largebatch.shards.segment import read_segment

    left = number
    with zstandard.open(file, "wt", encoding="utf-8") as out:
        for url, shard in resolve_source([str(PAIRS)]):
            for segment in shard.segments:
                for record in read_segment(url, segment, fields={}, source="code"):
                    pair = {"query": record.query, "document": record.document}
                    out.write(json.dumps(pair) + "\n")
                    left -= 1
                    if left == 0:
                        return
    raise SystemExit(f"{PAIRS} has {number - left} pairs, {number} are needed")


def timed(command: list[str]) -> tuple["subprocess.CompletedProcess[str]", float]:
    """Run a command, its progress on the console, and return what it printed and its seconds."""
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.cwd())
    print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    return done, time.perf_counter() - start


def last_line(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the last that a command said."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def fenced(lines: Iterable[str]) -> str:
    """Return lines as a block of text."""
    return "\n".join(["```text", *lines, "```"])


def page(name: str, today: datetime.date, parts: dict[str, Part]) -> str:
    """Return the whole page."""
    import torch

    lines = [
        f"# {name}, {today}",
        "",
        f"torch {torch.__version__}; made by `python benchmarks/gpu.py`. What failed is here too.",
    ]
    for title, part in parts.items():
        state = "failed" if part.failed else "done"
        lines += ["", f"## {title}: {state} after {part.seconds:.0f} s", "", part.text]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
