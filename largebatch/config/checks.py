"""What checks of options share."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from largebatch.errors import UserError


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed word that looks most like `value`, if any does."""
    return next(iter(difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)), None)


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest allowed value, or an empty string.

    >>> suggest("maen", ["cls", "mean"])
    " (did you mean 'mean'?)"
    """
    near = nearest(value, allowed)
    return "" if near is None else f" (did you mean {near!r}?)"


def least_of(value: str) -> float | None:
    """Return the number of `>=NUMBER`, or None for a plain value.

    >>> least_of(">= 0.8"), least_of("entailment")
    (0.8, None)
    """
    return float(value[2:]) if value.startswith(">=") else None


def changed_options(options: Any) -> dict[str, Any]:
    """Return those options of a dataclass that are not at their defaults, by name."""
    found = {}
    for one in fields(options):
        usual = one.default_factory() if one.default_factory is not MISSING else one.default
        if (value := getattr(options, one.name)) != usual:
            found[one.name] = value
    return found


class Faults:
    """Collects what is wrong with a config, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def one_of(self, option: str, value: str, allowed: Iterable[str]) -> None:
        """Note a value that is not among the allowed ones, with the nearest of them."""
        names = list(allowed)
        if value not in names:
            self.found.append(
                f"{option}={value!r} is not one of {', '.join(names)}{suggest(value, names)}"
            )

    def at_least(self, option: str, value: float, minimum: float) -> None:
        """Note a number below its minimum (or not a number)."""
        if not value >= minimum:
            self.found.append(f"{option}={value} must be at least {minimum}")
        elif value == math.inf:
            self.found.append(f"{option}={value} must be a finite number")

    def above(self, option: str, value: float, minimum: float) -> None:
        """Note a number that is not above a bound."""
        if not value > minimum:
            self.found.append(f"{option}={value} must be above {minimum}")
        elif value == math.inf:
            self.found.append(f"{option}={value} must be a finite number")

    def unit_interval(self, option: str, value: float) -> None:
        """Note a number outside [0, 1]."""
        if not 0 <= value <= 1:
            self.found.append(f"{option}={value} must lie between 0 and 1")

    def not_empty(self, option: str, value: str | Sequence[str], cure: str) -> None:
        """Note an empty text, or a list that is empty or holds an empty text."""
        self.check(bool(value) and all(value), f"{option} is empty; {cure}")

    def folders(self, option: str, folders: Mapping[str, str]) -> None:
        """Note each entry of a mapping that names no folder."""
        for name, folder in folders.items():
            self.not_empty(f"{option}.{name}", folder, "name a folder")

    def fields(self, option: str, fields: Mapping[str, str]) -> None:
        """Note names of fields that are given for something that no record has."""
        roles = ("query", "document", "negatives", "id", "scores", "label", "grade")
        for name in sorted(set(fields) - set(roles)):
            self.found.append(
                f"{option}.{name} means nothing; {option} maps {', '.join(roles[:-1])} and grade "
                f"to the names of your fields{suggest(name, roles)}"
            )

    def check(self, holds: bool, message: str) -> None:
        """Note a message unless something holds."""
        if not holds:
            self.found.append(message)

    def finish(self) -> None:
        """Raise UserError with all that was noted, if anything was."""
        if self.found:
            raise UserError("; ".join(self.found))
