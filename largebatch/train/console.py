"""The lines that a run prints: a row of numbers per step, a line per evaluated set."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from largebatch.train.names import is_of_objective


def header_line(max_steps: int, values: Mapping[str, float]) -> str:
    """Return the names over the columns of `step_line` for such values."""
    cells = [column.title.rjust(column.width) for column in _columns(values)]
    return "  ".join(["step".rjust(_step_width(max_steps)), *cells])


def step_line(step: int, max_steps: int, values: Mapping[str, float]) -> str:
    """Return one step's `train/...` values in columns; a value that is absent shows as `-`."""
    cells = [
        (column.text(values[column.name]) if column.name in values else "-").rjust(column.width)
        for column in _columns(values)
    ]
    return "  ".join([f"{step}/{max_steps}".rjust(_step_width(max_steps)), *cells])


def evaluation_lines(step: int, max_steps: int, values: Mapping[str, float]) -> list[str]:
    """Return a line for each set in `eval/<set>/<metric>`, its metrics in the order given."""
    metrics_by_set: dict[str, list[str]] = {}
    for name, value in values.items():
        if name.startswith("eval/"):
            set_name, _, metric = name.removeprefix("eval/").rpartition("/")
            metrics_by_set.setdefault(set_name, []).append(f"{metric} {value:.4f}")
    place = f"{step}/{max_steps}".rjust(_step_width(max_steps))
    return [
        f"{place}  eval {set_name}:  {'  '.join(metrics)}"
        for set_name, metrics in metrics_by_set.items()
    ]


class _Column(NamedTuple):
    title: str
    name: str
    width: int
    text: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _significant(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _large(value: float) -> str:
    """Shorten a count.

    >>> [_large(value) for value in (950.4, 12_340, 99_960, 1_234_567)]
    ['950', '12.3k', '100k', '1.23M']
    """
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    """Write seconds as [days] hours:minutes:seconds.

    >>> [_duration(seconds) for seconds in (59.6, 3723, 200_000)]
    ['1:00', '1:02:03', '2d 07:33']
    """
    if not 0 <= seconds < float("inf"):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _step_width(max_steps: int) -> int:
    return max(len("step"), 2 * len(str(max_steps)) + 1)


def _short(name: str) -> str:
    """Shorten a metric's name to 8 letters that tell it from its like.

    >>> [_short(name) for name in ("found", "agreement", "encoder_loss", "encoder_accuracy")]
    ['found', 'agreemen', 'enc_loss', 'enc_accu']
    """
    first, *others = name.split("_")
    if len(name) <= 8 or not others:
        return name[:8]
    return f"{first[:3]}_{others[-1][:4]}"


def _columns(values: Mapping[str, float]) -> list[_Column]:
    """Return the columns for a run's values: two of them are the objective's."""
    known = [column for column in _OF_CONTRASTIVE if column.name in values]
    others = [name for name in values if is_of_objective(name)]
    found = known or [
        _Column(_short(name.removeprefix("train/")), name, 8, _significant) for name in others[:2]
    ]
    return [_LOSS, *found, *_COLUMNS]


_LOSS = _Column("loss", "train/loss", 7, "{:.4f}".format)
_OF_CONTRASTIVE = (
    _Column("acc", "train/accuracy", 6, _percent),
    _Column("temp", "train/temperature", 6, "{:.4f}".format),
)
_COLUMNS = (
    _Column("lr", "train/lr", 8, "{:.2e}".format),
    _Column("grad", "train/grad_norm", 8, _significant),
    _Column("pairs/s", "train/pairs_per_s", 7, _large),
    _Column("tokens/s", "train/tokens_per_s", 8, _large),
    _Column("padding", "train/padding_share", 7, _percent),
    _Column("GiB", "train/memory_gib", 6, "{:.2f}".format),
    _Column("wait", "train/data_wait_share", 6, _percent),
    _Column("left", "train/eta_s", 8, _duration),
)
"""Narrow enough that a line with seven-digit steps fits into 120 characters."""
