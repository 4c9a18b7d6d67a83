"""What `largebatch bench` leaves behind: tables, results.json and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from largebatch.config.bench import Case
from largebatch.files import write_text
from largebatch.phases import PHASES

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = "results.json"
COLORS = {
    "data": "#7f8c8d",
    "embed": "#2f6db5",
    "gather": "#e0a526",
    "loss": "#c0504d",
    "replay": "#7fb2e5",
    "sync": "#d0691f",
    "optimizer": "#2f8f5b",
    "other": "#c9c9c9",
}


class Row(NamedTuple):
    """A case, and what became of it."""

    case: Case
    figures: dict[str, Any] | None
    """What `measure_case` returned; None: it could not be measured."""
    reason: str = ""
    """Why not."""
    config: Mapping[str, Any] = {}
    """The whole config of the case's run."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "case": self.case._asdict(),
            "label": str(self.case),
            "measured": self.figures is not None,
            "reason": self.reason,
            "figures": self.figures,
            "config": dict(self.config),
        }


def write_results(
    folder: Path, machine: Mapping[str, Any], options: Mapping[str, Any], rows: Sequence[Row]
) -> Path:
    """Write results.json, in one go, and return where it is."""
    content = {
        "machine": dict(machine),
        "options": dict(options),
        "cases": [row.to_dict() for row in rows],
    }
    file = folder / RESULTS
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return file


def speed_table(rows: Sequence[Row]) -> "Table":
    """Return a row per case: speed, share of what the machine can do, memory."""
    table = _table("speed and memory")
    for heading in (
        "pairs/s", "tokens/s", "MFU", "useful", "paid", "forwards", "GiB", "padding", "repeated",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.figures is None:
            table.add_row(*_names(row.case), "failed", *["-"] * 8)
            continue
        get = row.figures.__getitem__
        table.add_row(
            *_names(row.case),
            _short(get("pairs_per_s")),
            _short(get("tokens_per_s")),
            "-" if get("mfu") is None else f"{get('mfu'):.1%}",
            f"{get('useful_share_of_matmul'):.0%}",
            f"{get('paid_share_of_matmul'):.0%}",
            f"{get('forwards'):.2f}",
            f"{get('memory_gib'):.2f}",
            f"{get('padding_share'):.1%}",
            f"{get('repeated_share'):.1%}",
        )
    return table


def phase_table(rows: Sequence[Row]) -> "Table":
    """Return a row per case: time of a step, and the share of each phase."""
    table = _table("time of a step by phase")
    for heading in ("s/step", *PHASES, "other"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.figures is None:
            continue
        step_s = row.figures["step_s"]
        table.add_row(
            *_names(row.case),
            f"{step_s:.3g}",
            *(f"{seconds / step_s:.1%}" for _, seconds in _spans(row.figures)),
        )
    return table


def draw_plots(folder: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Draw throughput.png and phases.png of the measured cases, and return where they are."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from largebatch.plot_style import BLUE, STYLE, save_figure, short_number

    measured = [(_one_line(row.case), row.figures) for row in rows if row.figures is not None]
    names = [name for name, _ in measured]
    places = range(len(measured))
    height = 1.7 + 0.34 * len(measured)
    where = f"{machine['device']}, {_ranks(machine)}, {machine['format']}"
    files = [folder / "throughput.png", folder / "phases.png"]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        ax = figure.subplots()
        speeds = [figures["pairs_per_s"] for _, figures in measured]
        spread = [
            [abs(end(f["pairs_per_s_of_repeats"]) - f["pairs_per_s"]) for _, f in measured]
            for end in (min, max)
        ]
        bars = ax.barh(places, speeds, color=BLUE, height=0.7, xerr=spread, ecolor="#222222")
        ax.bar_label(bars, [_short(speed) for speed in speeds], padding=6, fontsize=9)
        ax.set_title(f"pairs per second, median and spread of repeats\n{where}")
        ax.set_xlim(
            0, 1.12 * max(max(figures["pairs_per_s_of_repeats"]) for _, figures in measured)
        )
        _finish(ax, names, short_number)
        save_figure(figure, files[0])

        figure = Figure(figsize=(9, height + 0.3), layout="constrained")
        ax = figure.subplots()
        left = [0.0] * len(measured)
        for number, name in enumerate((*PHASES, "other")):
            spans = [
                1e6 * max(_spans(figures)[number][1], 0) * _per_pair(figures)
                for _, figures in measured
            ]
            ax.barh(places, spans, left=left, color=COLORS[name], height=0.7, label=name)
            left = [a + b for a, b in zip(left, spans, strict=True)]
        ax.set_title(f"microseconds per pair, by phase\n{where}")
        _finish(ax, names, short_number)
        figure.legend(loc="outside lower center", ncols=8, frameon=False, fontsize=9)
        save_figure(figure, files[1])
    return files


def _finish(ax: Any, names: Sequence[str], formatter: Any) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(formatter)


def _per_pair(figures: Mapping[str, Any]) -> float:
    """Return the steps per pair."""
    return 1 / float(figures["pairs_per_s"] * figures["step_s"])


def _spans(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    phases = [(name, float(figures["phases_s"][name])) for name in PHASES]
    return [*phases, ("other", float(figures["other_s"]))]


def _table(title: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("batch", "chunk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("keep", "strategy"):
        table.add_column(heading, no_wrap=True)
    return table


def _names(case: Case) -> tuple[str, str, str, str]:
    return f"{case.global_batch:,}", str(case.tokens_per_chunk), case.keep, case.strategy


def _one_line(case: Case) -> str:
    batch, chunk, keep, strategy = _names(case)
    return f"batch {batch}  chunk {chunk}  {keep}  {strategy}"


def _ranks(machine: Mapping[str, Any]) -> str:
    ranks = machine["ranks"]
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
