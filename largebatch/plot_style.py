"""How plots look: style, curves, axes and labels, shared by all plots of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

BLUE, ORANGE, GREEN, PURPLE, RED = "#2f6db5", "#d0691f", "#2f8f5b", "#7b5ea7", "#c0504d"
_INK, _GRAY, _PALE = "#222222", "#6f6f6f", "#a0a0a0"
_TICKS = [1, 2, 5, 10]
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _PALE,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#ebebeb",
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "text.color": _INK,
    "xtick.color": _PALE,
    "xtick.labelcolor": _INK,
    "ytick.color": _PALE,
    "ytick.labelcolor": _INK,
}


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a .png file, aside first.

    Raises:
        UserError: It can't be written.
    """
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


class Series(NamedTuple):
    """One metric over the run."""

    steps: Floats
    """`[n]`, optimizer steps."""
    values: Floats
    """`[n]`, NaN where the value was not finite."""

    @property
    def last(self) -> float:
        """The last finite value."""
        return float(self.values[np.isfinite(self.values)][-1])


class Label(NamedTuple):
    """A name that is written beside the end of a curve."""

    height: float
    """Where the curve ends, on the y axis."""
    text: str
    color: str


def smooth(series: Series) -> Series:
    """Return a local linear fit under a Gaussian as wide as 1/40 of the run, at most 500 points.

    A plain moving average would start and end beside a curve that is steep there.
    """
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    groups = np.arange(len(steps)) * min(500, len(steps)) // len(steps)
    sizes = np.bincount(groups)
    steps, values = np.bincount(groups, steps) / sizes, np.bincount(groups, values) / sizes
    offsets = np.subtract.outer(np.arange(len(steps)), np.arange(len(steps))).astype(float)
    weights = np.exp(-0.5 * (offsets / max(1.0, len(steps) / 40)) ** 2)
    s0, s1, s2 = (np.sum(weights * offsets**power, axis=1) for power in (0, 1, 2))
    t0, t1 = (np.sum(weights * offsets**power * values, axis=1) for power in (0, 1))
    return Series(steps, (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2))


def draw_curve(ax: "Axes", series: Series, color: str) -> None:
    """Draw what is known exactly, such as a learning rate."""
    marker = "o" if len(series.steps) == 1 else ""
    ax.plot(*series, color=color, linewidth=2, marker=marker, solid_capstyle="round")


def draw_noisy_curve(ax: "Axes", series: Series, color: str) -> None:
    """Draw a measurement pale, and its smoothed curve over it."""
    if len(series.steps) < 10:
        draw_curve(ax, series, color)
        return
    ax.plot(*series, color=color, alpha=0.3, linewidth=0.9)
    ax.plot(*smooth(series), color=color, linewidth=2, solid_capstyle="round")


def draw_points(ax: "Axes", series: Series, color: str) -> None:
    """Draw few values, each with a mark."""
    ax.plot(*series, color=color, linewidth=2, marker="o", markersize=5, clip_on=False, zorder=3)


def draw_level(ax: "Axes", height: float, color: str) -> None:
    """Draw a dashed line to compare with."""
    ax.axhline(height, color=color, linestyle=(0, (4, 3)), linewidth=1.4)


def write_labels(ax: "Axes", labels: Sequence[Label], *, axes_height: float) -> None:
    """Write labels at the right edge, moved up where they would overlap.

    `axes_height` is that of the plot in inches; call it when the limits of y are final.
    """
    bottom, top = ax.get_ylim()
    gap = 0.17 / axes_height
    free = -1.0
    for label in sorted(labels):
        height = max((label.height - bottom) / (top - bottom), free)
        free = height + gap
        ax.text(
            1.02, height, label.text, color=label.color, transform=ax.transAxes, va="center",
            fontsize=9,
        )  # fmt: skip


def short_number(value: float, _position: float = 0) -> str:
    """Write a tick's number.

    >>> [short_number(value) for value in (0, 0.05, 200, 1500, 3e6)]
    ['0', '0.05', '200', '1.5k', '3M']
    """
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:.4g}"


def style_axes(ax: "Axes", low: float, high: float) -> None:
    """Let x run over the optimizer steps `low` to `high`, and y have few ticks."""
    from matplotlib.ticker import MaxNLocator

    margin = 0.02 * (high - low) or 1
    ax.set_xlim(low - margin, high + margin)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=_TICKS))
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=_TICKS))
    ax.xaxis.set_major_formatter(short_number)
    ax.set_xlabel("optimizer step")


def add_pairs_axis(ax: "Axes", seen: Series) -> None:
    """Write above the plot how many pairs the model had seen (they grow evenly with the step)."""
    from matplotlib.ticker import MaxNLocator

    slope = float(np.ptp(seen.values) / np.ptp(seen.steps))
    start = float(seen.values[0] - slope * seen.steps[0])

    def pairs_of(step: Any) -> Any:
        return start + slope * step

    def step_of(pairs: Any) -> Any:
        return (pairs - start) / slope

    above = ax.secondary_xaxis("top", functions=(pairs_of, step_of))
    above.xaxis.set_major_locator(MaxNLocator(7, steps=_TICKS))
    above.xaxis.set_major_formatter(short_number)
    above.set_xlabel("pairs seen", color=_GRAY, fontsize=9)
    above.tick_params(color=_PALE, labelcolor=_GRAY, labelsize=8.5, length=2.5)
    above.spines["top"].set_color(_PALE)


def add_inverse_axis(ax: "Axes", title: str) -> None:
    """Write 1/y at the right of the plot."""

    def inverse(y: Any) -> Any:
        return 1 / np.maximum(y, 1e-9)

    right = ax.secondary_yaxis("right", functions=(inverse, inverse))
    right.yaxis.set_major_formatter(short_number)
    right.set_ylabel(title, color=_GRAY, fontsize=9)
    right.tick_params(color=_PALE, labelcolor=_GRAY, labelsize=8.5, length=2.5)
    right.spines["right"].set_color(_PALE)
