"""Whether a run may go on from what its folder holds."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from largebatch.errors import UserError

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

AS_BEGUN = ("pooling.*", "text.*")
"""Options that a checkpoint answers where they are unset: a run that goes on has its answers."""


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
        and not (new.get(key, "unset") is None and _is_among(key, AS_BEGUN))
    ]
    if differences:
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(differences)}); set these back "
            "to resume it, or choose another output_dir"
        )


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
