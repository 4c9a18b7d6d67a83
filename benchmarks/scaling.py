"""How speed scales: with the number of processes, and as the global batch grows.

    python benchmarks/scaling.py                     # the quickstart's model, on quiet cores
    python benchmarks/scaling.py --processes 1 2 --batch 256 --batches 256 512 --repeats 1

`largebatch bench` measures 1, 2 and 4 processes of one thread each at a fixed global batch, then a
growing batch at one number of processes. Texts are made up (see `synthetic` in `largebatch bench
--help`), so that the largest batch holds no text twice; `--sources real` reads what `largebatch
pairs code` wrote, whose records bound the batch. Writes benchmarks/results/scaling.md and .png.
The cost of a step should grow as its batch does, so pairs/s should stay flat in the second plot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GRAY = "#2f6db5", "#d0691f", "#8a8a8a"


def main() -> None:
    """Measure, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=4096, help="fixed, over the processes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--at", type=int, default=2, help="processes for the growing batch")
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--keep", default="none")
    parser.add_argument("--sources", choices=["synthetic", "real"], default="synthetic")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    by_processes = [
        (number, result)
        for number in options.processes
        for result in bench(options, processes=number, batches=[options.batch])
    ]
    growing = bench(options, processes=options.at, batches=options.batches)
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(options, by_processes, growing)
    (options.output / "scaling.md").write_text(text, encoding="utf-8")
    draw(options, by_processes, growing, options.output / "scaling.png")
    print(text)


def bench(
    options: argparse.Namespace, *, processes: int, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Run `largebatch bench` and return its cases; ends with its words if one can't be measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "largebatch", "bench", options.preset),
            f"batches=[{','.join(map(str, batches))}]",
            f"keep={options.keep}",
            f"synthetic={options.sources == 'synthetic'}",
            f"hardware.ranks={processes}",
            "hardware.threads=1",
            "data.workers=1",
            f"steps={options.steps}",
            f"repeats={options.repeats}",
            f"bench_dir={folder}",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        content = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    for case in content["cases"]:
        if not case["measured"]:
            sys.exit(f"{processes} processes, {case['label']}: {case['reason']}")
    return [case | {"machine": content["machine"]} for case in content["cases"]]


def table(
    options: argparse.Namespace,
    by_processes: Sequence[tuple[int, dict[str, Any]]],
    growing: Sequence[dict[str, Any]],
) -> str:
    """Return both measurements as Markdown."""
    machine = growing[0]["machine"]
    first_number, first = by_processes[0]
    base = first["figures"]["pairs_per_s"] / first_number
    lines = [
        f"{options.preset}, keep={options.keep}, {options.sources} texts, one thread per process; "
        f"{machine['device']}, {os.cpu_count()} cores, torch {machine['torch']}. Medians of "
        f"{options.repeats}.",
        "",
        f"A global batch of {options.batch:,} pairs over processes (efficiency: pairs/s per "
        f"process, as a share of that at {first_number}):",
        "",
        "| processes | pairs/s | efficiency | paid, share of matmul rate | sync and gather | "
        "peak memory of a process, GiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for number, case in by_processes:
        figures = case["figures"]
        phases, step_s = figures["phases_s"], figures["step_s"]
        lines.append(
            f"| {number} | {figures['pairs_per_s']:,.0f} "
            f"| {figures['pairs_per_s'] / number / base:.0%} "
            f"| {figures['paid_share_of_matmul']:.0%} "
            f"| {(phases['sync'] + phases['gather']) / step_s:.1%} "
            f"| {figures['memory_gib']:.2f} |"
        )
    lines += [
        "",
        f"A growing batch at {options.at} processes:",
        "",
        "| global batch | pairs/s | seconds per step | loss, share of the step | forwards "
        "| peak memory of a process, GiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for case in growing:
        figures = case["figures"]
        lines.append(
            f"| {case['case']['global_batch']:,} | {figures['pairs_per_s']:,.0f} "
            f"| {figures['step_s']:.2f} "
            f"| {figures['phases_s']['loss'] / figures['step_s']:.1%} "
            f"| {figures['forwards']:.2f} | {figures['memory_gib']:.2f} |"
        )
    return "\n".join([*lines, "", "Made by `python benchmarks/scaling.py`.", ""])


def draw(
    options: argparse.Namespace,
    by_processes: Sequence[tuple[int, dict[str, Any]]],
    growing: Sequence[dict[str, Any]],
    file: Path,
) -> None:
    """Draw pairs/s over processes, and over the batch."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from largebatch.plot_style import STYLE, short_number

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        numbers = [number for number, _ in by_processes]
        _points(left, numbers, [case for _, case in by_processes], BLUE)
        base = by_processes[0][1]["figures"]["pairs_per_s"] / numbers[0]
        left.plot(numbers, [base * n for n in numbers], color=GRAY, linestyle=(0, (4, 3)), zorder=1)
        cores = os.cpu_count() or 1
        if max(numbers) > cores:
            left.axvline(cores, color=GRAY, linewidth=1)
            left.annotate(
                f" {cores} cores", (cores, 0.02), xycoords=("data", "axes fraction"), fontsize=9
            )
        left.set(
            xlabel="processes of one thread (dashed: as many times the first)",
            ylabel="pairs/s",
            title=f"Processes, at a batch of {options.batch:,}",
        )
        batches = [case["case"]["global_batch"] for case in growing]
        _points(right, batches, growing, ORANGE)
        right.set(
            xlabel="global batch",
            ylabel="pairs/s",
            title=f"A growing batch, {options.at} processes: flat is ideal",
        )
        for ax, ticks in ((left, numbers), (right, batches)):
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
            ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
            ax.yaxis.set_major_formatter(short_number)
        figure.savefig(file)


def _points(ax: Any, places: Sequence[int], cases: Sequence[dict[str, Any]], color: str) -> None:
    figures = [case["figures"] for case in cases]
    speeds = [f["pairs_per_s"] for f in figures]
    spread = [
        [abs(end(f["pairs_per_s_of_repeats"]) - f["pairs_per_s"]) for f in figures]
        for end in (min, max)
    ]
    ax.errorbar(places, speeds, yerr=spread, color=color, marker="o", linewidth=2, capsize=3)
    for place, speed in zip(places, speeds, strict=True):
        ax.annotate(
            f"{speed:,.0f}", (place, speed), (0, 9), textcoords="offset points", ha="center",
            fontsize=9,
        )  # fmt: skip


if __name__ == "__main__":
    main()
