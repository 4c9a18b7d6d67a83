"""How far a run came, and whether it may go on from what its folder holds."""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.config import SourceConfig, TrainConfig
from largebatch.errors import UserError
from largebatch.files import bring_back
from largebatch.train.checkpoint import Kind, damaged, list_checkpoints, read_details
from largebatch.train.result import is_over

MAY_CHANGE = (
    "checkpoint",
    "data.buffer_mib",
    "data.max_chars",
    "data.max_skipped_share",
    "data.on_fault",
    "data.prefetch",
    "data.read_attempts",
    "data.read_timeout_s",
    "data.sources.*.urls",  # the shards may have moved; their fingerprints must not change
    "data.workers",
    "debug",
    "eval",
    "hardware",
    "backbone.attention",
    "backbone.packing",
    "balance",
    "keep",
    "keep_gib",
    "logger",
    "max_steps",
    "name",
    "output_dir",
    "strategy",
    "tokens_per_chunk",
)
"""Options that say how to run and how long, not what is trained on or how."""

NEWER = ("data.sources.*.mask_same_id",)
"""Options that were not there when older runs began, and are now what they will. Others must have
their defaults, which change nothing."""

AS_BEGUN = ("pooling.*", "text.*")
"""Options that a checkpoint answers where they are unset: a run that goes on has its answers."""


class Progress(NamedTuple):
    """How far earlier processes of a run came."""

    step: int
    """Steps that are saved."""
    elapsed_s: float
    """Seconds that they took."""
    is_over: bool
    """Whether nothing is left to do."""


def find_progress(folder: Path, config: TrainConfig) -> Progress:
    """Look how far the run in a folder came; nobody else may write to it.

    Raises:
        UserError: It can't go on with this config, or its newest checkpoint is damaged.
    """
    settings = asdict(config)
    checkpoints = folder / "checkpoints"
    bring_back(checkpoints)
    steps = list_checkpoints(checkpoints)
    elapsed_s = 0.0
    if steps:
        details = read_run_details(checkpoints, steps[-1])
        check_same_run(details["config"], settings, folder=str(folder))
        if steps[-1] > config.max_steps:
            raise UserError(
                f"{folder} was trained for {steps[-1]} steps, more than max_steps="
                f"{config.max_steps}; choose another output_dir"
            )
        elapsed_s = float(details["elapsed_s"])
    step = steps[-1] if steps else 0
    return Progress(step, elapsed_s, step == config.max_steps and is_over(folder, step))


def read_run_details(checkpoints: Path, step: int) -> dict[str, Any]:
    """Return state.json of a run's checkpoint, as `read_details` does."""
    further: dict[str, Kind] = {"elapsed_s": (int, float), "shards": dict, "engine": dict}
    details = read_details(checkpoints, step, further=further)
    engine = details["engine"]
    if missing := {"tokens_per_chunk", "keep_plan"} - engine.keys():
        raise damaged(checkpoints, step, f"engine lacks {sorted(missing)}")
    # Older checkpoints have what is the least of all ranks, and not each one's own.
    of_ranks = engine.setdefault("of_ranks", [dict(engine)] * details["world_size"])
    if not isinstance(of_ranks, list) or len(of_ranks) != details["world_size"]:
        raise damaged(checkpoints, step, "engine.of_ranks is not a list of all ranks")
    return details


def check_same_run(saved: dict[str, Any], now: dict[str, Any], *, folder: str) -> None:
    """Check that a config continues the run whose config was saved.

    Raises:
        UserError: An option that decides what is trained differs; each is shown.
    """
    old, new = dict(_flatten(saved)), dict(_flatten(now))
    differences = [
        f"{key}: {old.get(key, 'unset')!r} -> {new.get(key, 'unset')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "unset") != new.get(key, "unset")
        and not _is_among(key, MAY_CHANGE)
        and not (key not in old and (_is_among(key, NEWER) or new[key] == _default_of(key)))
        and not (new.get(key, "unset") is None and _is_among(key, AS_BEGUN))
    ]
    if differences:
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(differences)}); set these back "
            "to resume it, or choose another output_dir"
        )


def _default_of(key: str) -> Any:
    """Return the default of an option; of a source's, that of any source."""
    return next((value for name, value in _defaults() if fnmatchcase(key, name)), "unset")


@cache
def _defaults() -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for one in fields(TrainConfig):
        value: Any = one.default
        if one.default_factory is not MISSING:
            value = one.default_factory()
            value = asdict(value)
        found[one.name] = value
    found["data"]["sources"] = {"*": asdict(SourceConfig())}
    return list(_flatten(found))


def _is_among(key: str, options: Sequence[str]) -> bool:
    return any(
        fnmatchcase(key, pattern) for option in options for pattern in (option, f"{option}.*")
    )


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
