"""The conformance table: whose distributed gradient is that of the full batch?

    python benchmarks/peers/conformance.py --gradcache-path ../GradCache

Every implementation gets the same tiny float64 BERT, the same pairs and the same ranks (gloo, CPU),
is wrapped as its own trainer wraps it (DDP, which averages gradients over ranks), and takes one
backward pass. Its gradient, of the weights and of a learned temperature where it has one, is
compared with one plain backward pass over the whole batch in one process. A cell is the ratio of
the norms, and the cosine where the direction is off too. What is not installed is left out, with
the command that installs it. Two minutes on one busy core.
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]

import installed  # noqa: E402
import numpy as np  # noqa: E402
from contenders import CONTENDERS, Contender, full_batch_gradient  # noqa: E402
from dist import run_ranks  # noqa: E402
from task import NUM_PAIRS, Task, make_task  # noqa: E402

RANKS = (1, 2, 4)


class Cell(NamedTuple):
    """One implementation's gradient on one number of ranks, against the full batch's."""

    weights_ratio: float
    """Its norm over the full batch's."""
    weights_cosine: float
    temperature_ratio: float | None
    """Signed; None where the temperature is not learned."""
    error: str = ""
    """Why there is no gradient."""


def main() -> None:
    """Print the table, and write it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gradcache-path", help="a clone of github.com/luyug/GradCache")
    parser.add_argument("--only", nargs="+", help="peers, such as open_clip")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--debug", action="store_true", help="show why an implementation failed")
    options = parser.parse_args()
    installed.add_gradcache(options.gradcache_path)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.filterwarnings("ignore")  # the peers' own, such as deprecations

    rows: dict[str, dict[int, Cell]] = {}
    skipped: dict[str, str] = {}
    for contender in CONTENDERS:
        if options.only and contender.peer not in options.only:
            continue
        try:
            contender.load()
        except installed.MissingPeerError as error:
            skipped[contender.name] = str(error)
            continue
        rows[contender.name] = {
            ranks: measure(contender, ranks, debug=options.debug) for ranks in options.ranks
        }
    text = table(rows, options.ranks, skipped)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


def measure(contender: Contender, num_ranks: int, *, debug: bool = False) -> Cell:
    """Run one implementation on some ranks and compare its gradient with the full batch's."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder))
        expected = full_batch_gradient(task, contender)
        try:
            found = run_ranks(_on_rank, num_ranks, task, contender, timeout_s=60.0)[0]
        except Exception as error:
            if debug:
                raise
            reason = " ".join(str(error).split())[:100]
            return Cell(0, 0, None, f"{type(error).__name__}: {reason}")
    weights, temperature = found
    norms = float(np.linalg.norm(weights)), float(np.linalg.norm(expected.weights))
    return Cell(
        norms[0] / norms[1],
        float(weights @ expected.weights) / (norms[0] * norms[1]),
        None
        if temperature is None or expected.temperature is None
        else temperature / expected.temperature,
    )


def _on_rank(task: Task, contender: Contender) -> tuple[Any, float | None]:
    import torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gradient = contender.run(task.part(rank, size))
    return gradient.weights, gradient.temperature


def table(rows: dict[str, dict[int, Cell]], ranks: tuple[int, ...], skipped: dict[str, str]) -> str:
    """Return the results as Markdown."""
    import torch

    heads = [f"weights, {n}" for n in ranks] + [f"temperature, {n}" for n in ranks]
    lines = [
        f"torch {torch.__version__}, gloo on CPU, float64, {NUM_PAIRS} pairs.",
        "",
        "| implementation | version | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(heads),
    ]
    notes = []
    for contender in CONTENDERS:
        if contender.name not in rows:
            continue
        cells = rows[contender.name]
        texts = [_weights_text(cells[n]) for n in ranks]
        texts += [_temperature_text(cells[n]) for n in ranks]
        lines.append(f"| {contender.name} | {contender.version()} | " + " | ".join(texts) + " |")
        notes += [
            f"- {contender.name}, {n} ranks: {cells[n].error}" for n in ranks if cells[n].error
        ]
    lines += ["", *notes] if notes else []
    if skipped:
        lines += ["", "Skipped:", ""]
        lines += [f"- {name}: {reason}" for name, reason in skipped.items()]
    return "\n".join(lines)


def _weights_text(cell: Cell) -> str:
    if cell.error:
        return "fails"
    exact = abs(cell.weights_cosine - 1) < 1e-9
    return _ratio_text(cell.weights_ratio) + ("" if exact else f" (cos {cell.weights_cosine:.4f})")


def _temperature_text(cell: Cell) -> str:
    return "-" if cell.temperature_ratio is None else _ratio_text(cell.temperature_ratio)


def _ratio_text(ratio: float) -> str:
    return "1" if abs(ratio - 1) < 1e-6 else f"{ratio:.4f}"


if __name__ == "__main__":
    main()
