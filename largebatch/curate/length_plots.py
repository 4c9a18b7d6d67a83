"""Plots of how long the texts of the sources are, and where training cuts them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.curate.statistics import SIDES, Lengths, share_above
from largebatch.plot_style import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    STYLE,
    save_figure,
    short_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = dict(zip(SIDES, (BLUE, GREEN, ORANGE), strict=True))
_TITLES = {"query": "queries", "document": "documents", "negative": "negatives"}
_WIDTH, _ROW_HEIGHT = 4.6, 1.25  # of one plot, in inches
_BINS_PER_DOUBLING = 4


class SourceLengths(NamedTuple):
    """One row of the plot."""

    name: str
    """Name of the source."""
    lengths: Lengths
    """Of its texts, by side."""


def draw_lengths(
    sources: Sequence[SourceLengths],
    *,
    unit: str,
    limits: Mapping[str, int],
    title: str,
    path: Path,
) -> None:
    """Draw a histogram for each source and side into a PNG, over one logarithmic axis per side.

    Args:
        sources: At least one.
        unit: characters or tokens.
        limits: By side, the length at which training cuts; sides without one are not cut.
        title: Stands above all.
        path: The file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sides = [side for side in SIDES if any(len(source.lengths[side]) for source in sources)]
    sides = sides or ["query", "document"]
    size = (_WIDTH * len(sides), _ROW_HEIGHT * len(sources) + 1.3)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05))
        figure.suptitle(title, x=0.12 / size[0], ha="left")
        grid: Any = figure.subplots(len(sources), len(sides), squeeze=False, sharex="col")
        for column, side in enumerate(sides):
            # Negatives are documents, and are to be compared with them.
            alike = ["query"] if side == "query" else ["document", "negative"]
            everything = [source.lengths[other] for source in sources for other in alike]
            edges = length_bins(np.concatenate(everything), at_least=limits.get(side, 1))
            for ax, source in zip(grid[:, column], sources, strict=True):
                _draw(ax, source.lengths[side], edges, limits.get(side), _COLORS[side])
            grid[0, column].set_title(_TITLES[side])
            grid[-1, column].set_xlabel(f"{unit} per text")
        for ax, source in zip(grid[:, 0], sources, strict=True):
            ax.set_ylabel(
                source.name, rotation=0, ha="right", va="center", fontweight="bold", labelpad=8
            )
        save_figure(figure, path)


def length_bins(lengths: npt.NDArray[Any], *, at_least: int) -> npt.NDArray[np.float64]:
    """Return edges of bins that are equally wide on a logarithmic axis.

    They lie between whole numbers, and each bin holds at least one, or short lengths would make a
    comb.
    """
    low = max(1, int(lengths.min())) if len(lengths) else 1
    high = max(at_least, int(lengths.max()) if len(lengths) else 1, low + 1)
    number = int(np.ceil(np.log2(high / low) * _BINS_PER_DOUBLING)) + 2
    edges = np.unique(np.round(np.geomspace(low, high * 1.15 + 1, number)))
    result: npt.NDArray[np.float64] = edges - 0.5
    return result


def _draw(
    ax: "Axes",
    lengths: npt.NDArray[Any],
    edges: npt.NDArray[np.float64],
    limit: int | None,
    color: str,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    ax.set_xscale("log")
    ax.set_xlim(edges[0], edges[-1])
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(short_number)
    ax.yaxis.set_major_locator(NullLocator())
    ax.spines["left"].set_visible(False)
    if not len(lengths):
        ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", va="center", color="#6f6f6f")
        return
    # Per doubling of the length, so that a bin's area is its share, however wide it is.
    counts, _ = np.histogram(np.maximum(lengths, 1), edges)
    heights = counts / np.log2(edges[1:] / edges[:-1])
    ax.stairs(heights, edges, fill=True, color=color, alpha=0.75, linewidth=0)
    ax.set_ylim(0, heights.max() * 1.6)
    median = float(np.median(lengths))
    ax.plot([median, median], [0, heights.max() * 1.05], color="#222222", linewidth=1.2)
    ax.annotate(
        f"median {median:,.0f}", (median, heights.max() * 1.08), ha="center", va="bottom",
        fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )  # fmt: skip
    if limit is not None:
        ax.axvspan(limit + 0.5, edges[-1], color=RED, alpha=0.08, linewidth=0)
        ax.axvline(limit + 0.5, color=RED, linestyle=(0, (4, 3)), linewidth=1.3)
        ax.text(
            0.995, 0.98, f"{share_above(lengths, limit):.1%} cut at {limit:,}",
            transform=ax.transAxes, ha="right", va="top", color=RED, fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
