"""Plots of a run, drawn from its `metrics.jsonl`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from largebatch.plot_style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    STYLE,
    Label,
    Series,
    add_inverse_axis,
    add_pairs_axis,
    draw_curve,
    draw_level,
    draw_noisy_curve,
    draw_points,
    save_figure,
    short_number,
    style_axes,
    write_labels,
)
from largebatch.train.loggers import METRICS_FILE, read_metrics
from largebatch.train.names import is_of_objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = dict[str, Series]
Painter = Callable[["Axes", Metrics], None]

_WIDTH, _HEIGHT = 6.4, 4.0  # of one plot, in inches
_RETRIEVAL_METRICS = (
    ("ndcg@10", "nDCG@10", BLUE),
    ("mrr@10", "MRR@10", ORANGE),
    ("recall@10", "Recall@10", GREEN),
)


def draw_plots(folder: Path) -> list[Path]:
    """Draw `metrics.jsonl` of the run folder into `plots/*.png` and return the files written.

    A plot whose metrics were never logged is left out; without any metrics the list is empty.
    """
    import matplotlib as mpl

    run = _read_run(folder / METRICS_FILE)
    title = folder.resolve().name
    with mpl.rc_context(STYLE):
        single = _SINGLE | {
            name.removeprefix("train/"): (partial(_of_objective, name), name)
            for name in run
            if is_of_objective(name) and name not in {metric for _, metric in _SINGLE.values()}
        }
        figures = {
            name: _figure(run, title, [painter])
            for name, (painter, metric) in single.items()
            if metric in run
        }
        if rates := [painter for painter, metric in _THROUGHPUT if metric in run]:
            figures["throughput"] = _figure(run, title, rates, num_columns=1, height=2.2)
        if sets := _set_names(run):
            painters = [_painter_of_set(name) for name in sets]
            figures["retrieval"] = _figure(run, title, painters, width=_WIDTH + 0.8)
        if figures:
            small = [painter for painter, metric in _SINGLE.values() if metric in run]
            small += rates[:1] + ([_retrieval] if sets else [])
            figures["overview"] = _figure(run, title, small, width=5.2, height=3.4)
        written = [folder / "plots" / f"{name}.png" for name in figures]
        for path, figure in zip(written, figures.values(), strict=True):
            save_figure(figure, path)
    return written


def _read_run(path: Path) -> Metrics:
    """Return the metrics that have a finite value at least once, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in read_metrics(path):
        for name in entry.keys() - {"step"}:
            value = float("nan") if entry[name] is None else entry[name]
            points.setdefault(name, []).append((entry["step"], value))
    run = {name: Series(*np.asarray(pairs, float).T) for name, pairs in points.items()}
    return {name: run[name] for name in sorted(run) if np.isfinite(run[name].values).any()}


def _figure(
    run: Metrics,
    title: str,
    painters: list[Painter],
    *,
    num_columns: int = 3,
    width: float = _WIDTH,
    height: float = _HEIGHT,
) -> "Figure":
    """Paint plots of the same run side by side, or below each other, over the same steps."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_columns = min(num_columns, len(painters))
    num_rows = -(-len(painters) // num_columns)
    size = (width * num_columns, height * num_rows + 0.4)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, x=0.12 / size[0], ha="left")
    steps = np.concatenate([series.steps for series in run.values()])
    for place, painter in enumerate(painters):
        ax = figure.add_subplot(num_rows, num_columns, place + 1)
        style_axes(ax, steps.min(), steps.max())
        painter(ax, run)
        seen = run.get("train/pairs_seen")
        if num_columns == 1 and place == 0 and seen is not None and len(seen.steps) > 1:
            add_pairs_axis(ax, seen)
        if place + num_columns < len(painters):
            ax.set_xlabel("")
    return figure


def _loss(ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run["train/loss"], BLUE)
    ax.set_ylabel("loss")


def _accuracy(ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run["train/accuracy"], GREEN)
    _start_at_zero(ax)
    _show_percent(ax)
    ax.set_ylabel("in-batch accuracy")


def _temperature(ax: "Axes", run: Metrics) -> None:
    series = run["train/temperature"]
    draw_curve(ax, series, PURPLE)
    low, high = np.nanmin(series.values), np.nanmax(series.values)
    if high - low < 0.02 * high:  # fixed: a line in the middle instead of magnified rounding
        ax.set_ylim(0.5 * low, 1.5 * high)
    ax.yaxis.set_major_formatter(short_number)
    ax.set_ylabel("temperature")
    add_inverse_axis(ax, "logit scale (1 / temperature)")


def _of_objective(name: str, ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run[name], GREEN)
    ax.yaxis.set_major_formatter(short_number)
    ax.set_ylabel(name.removeprefix("train/").replace("_", " "))


def _learning_rate(ax: "Axes", run: Metrics) -> None:
    draw_curve(ax, run["train/lr"], ORANGE)
    _start_at_zero(ax)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
    ax.set_ylabel("learning rate")


def _pairs_per_s(ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run["train/pairs_per_s"], BLUE)
    _start_at_zero(ax)
    ax.yaxis.set_major_formatter(short_number)
    ax.set_ylabel("pairs per second")


def _tokens_per_s(ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run["train/tokens_per_s"], GREEN)
    _start_at_zero(ax)
    ax.yaxis.set_major_formatter(short_number)
    ax.set_ylabel("tokens per second")


def _data_wait(ax: "Axes", run: Metrics) -> None:
    draw_noisy_curve(ax, run["train/data_wait_share"], RED)
    _start_at_zero(ax, smallest_top=0.1)
    _show_percent(ax)
    ax.set_ylabel("time waiting for data")


def _painter_of_set(set_name: str) -> Painter:
    """Return what paints all scores of one retrieval set."""

    def paint(ax: "Axes", run: Metrics) -> None:
        labels = []
        for metric, title, color in _RETRIEVAL_METRICS:
            if series := run.get(f"eval/{set_name}/{metric}"):
                draw_points(ax, series, color)
                labels.append(Label(series.last, f"{title} {series.last:.3f}", color))
        if bm25 := run.get(f"eval/{set_name}/bm25/ndcg@10"):
            draw_level(ax, bm25.last, BLUE)
            labels.append(Label(bm25.last, f"BM25 nDCG@10 {bm25.last:.3f}", BLUE))
        _start_at_zero(ax, smallest_top=0.05)
        write_labels(ax, labels, axes_height=_HEIGHT)
        ax.set_ylabel("score")
        ax.set_title(set_name)

    return paint


def _retrieval(ax: "Axes", run: Metrics) -> None:
    """Paint nDCG@10 of all retrieval sets."""
    labels = []
    colors = (BLUE, ORANGE, GREEN, PURPLE, RED)
    for place, set_name in enumerate(_set_names(run)):
        color = colors[place % len(colors)]
        series = run[f"eval/{set_name}/ndcg@10"]
        draw_points(ax, series, color)
        labels.append(Label(series.last, f"{set_name} {series.last:.3f}", color))
        if bm25 := run.get(f"eval/{set_name}/bm25/ndcg@10"):
            draw_level(ax, bm25.last, color)
            labels.append(Label(bm25.last, f"{set_name}, BM25 {bm25.last:.3f}", color))
    _start_at_zero(ax, smallest_top=0.05)
    write_labels(ax, labels, axes_height=3)
    ax.set_ylabel("retrieval (nDCG@10)")


def _set_names(run: Metrics) -> list[str]:
    """Return the retrieval sets that have a score of the model, not of BM25 only."""
    names = [name.removeprefix("eval/").rpartition("/") for name in run if name[:5] == "eval/"]
    found = dict.fromkeys(name for name, _, metric in names if metric == "ndcg@10")
    return [name for name in found if not name.endswith("/bm25")]


def _start_at_zero(ax: "Axes", *, smallest_top: float = 0.0) -> None:
    ax.set_ylim(0, max(smallest_top, ax.get_ylim()[1]))


def _show_percent(ax: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


_SINGLE: dict[str, tuple[Painter, str]] = {
    "loss": (_loss, "train/loss"),
    "accuracy": (_accuracy, "train/accuracy"),
    "temperature": (_temperature, "train/temperature"),
    "learning_rate": (_learning_rate, "train/lr"),
}
"""Plots of one metric, by file name, and the metric that each needs."""

_THROUGHPUT: tuple[tuple[Painter, str], ...] = (
    (_pairs_per_s, "train/pairs_per_s"),
    (_tokens_per_s, "train/tokens_per_s"),
    (_data_wait, "train/data_wait_share"),
)
