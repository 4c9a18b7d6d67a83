"""Overrides: taken apart, checked against schema and presets, and put into Hydra's terms.

A user writes `option=value` for everything: entries of a mapping need no `+`, and the first word
may be a preset's name. A mistake is answered with the nearest name that exists.
"""

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from largebatch.cli.options import did_you_mean, find_option, takes_text
from largebatch.cli.presets import SCALE, Presets
from largebatch.cli.quoting import as_typed, cure, quoted
from largebatch.cli.values import show_value
from largebatch.config.checks import nearest
from largebatch.errors import UserError


def expand_preset(presets: Presets, overrides: Sequence[str]) -> list[str]:
    """Write a bare word in first place out: `quickstart` as `experiment=quickstart`."""
    if not overrides or "=" in overrides[0] or overrides[0].startswith(("~", "+")):
        return list(overrides)
    word, *others = overrides
    command = presets.command
    choices = presets.groups.get(command.preset_group, [])
    if hint := _as_option(command.config_class, word):
        raise UserError(f"{word!r} is not option=value{hint}")
    if not choices:
        raise UserError(
            f"{word!r} is not option=value, and {command.name} has no presets; for example: "
            f"largebatch {command.name} {command.examples[0]}"
        )
    for name in word.split(","):
        if name not in choices:
            there = did_you_mean(nearest(name, choices), choices, "choices")
            raise UserError(f"{name!r} is not a preset of {command.name}{there}")
    return [f"{command.preset_group}={word}", *others]


def expand(
    presets: Presets, overrides: Sequence[str], *, multirun: bool
) -> list[tuple[list[str], str]]:
    """Return, for each job, its overrides and what sets it apart (`optim.lr=0.1,seed=1`).

    Without `multirun` there is one job, and an option with several values is an error.
    """
    config_class = presets.command.config_class
    choices: list[list[tuple[str, str]]] = []
    for text in overrides:
        override = parse_override(config_class, text)
        if not override.is_sweep_override():
            choices.append([(text, "")])
        elif not multirun:
            raise UserError(
                f"{text!r} has several values; add -m to run once for each"
                + _as_one_value(presets, override)
            )
        elif not override.is_discrete_sweep():
            raise UserError(f"{text!r} is not a list of values, such as a,b,c or range(1,4)")
        else:
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            choices.append([(value, value) for value in values])
    return [
        ([text for text, _ in job], ",".join(mark for _, mark in job if mark))
        for job in itertools.product(*choices)
    ]


def parse_override(config_class: type[Any], text: str) -> Override:
    """Parse one override with Hydra's grammar, or raise a one-line UserError.

    A key may hold what the grammar has no place for, such as the name `müller/2024` of a source.
    """
    found = re.fullmatch(r"(~|\+{0,2})([^=]*)(=?)(.*)", text, re.DOTALL)
    assert found is not None
    prefix, key, equals, value = found.groups()
    if not equals and prefix != "~":
        raise UserError(f"{text!r} is not option=value{_as_option(config_class, text)}")
    if not key:
        raise UserError(f"{text!r} is not option=value: there is no option before the =")
    if (parsed := _parse(text)) is not None:
        return parsed
    # The name x stands in for one that Hydra can't read.
    if (parsed := _parse(f"{prefix}x{equals}{value}")) is not None:
        return dataclasses.replace(parsed, key_or_group=key, input_line=text)
    annotation = find_option(config_class, key)
    said = cure(f"{prefix}{key}", value, annotation, is_read=lambda v: _parse(f"x={v}") is not None)
    raise UserError(f"{text!r} cannot be read as option=value; {said}")


def _as_one_value(presets: Presets, override: Override) -> str:
    """Say how a list or a text with commas is written, where the option takes one."""
    key, value = override.get_key_element(), override.get_value_string()
    if override.key_or_group in presets.groups:
        return ""
    annotation = find_option(presets.command.config_class, override.key_or_group)
    if typing.get_origin(annotation) is list:
        return f", or write a list: {as_typed(f'{key}=[{value}]')}"
    if takes_text(annotation):
        return f", or put one text in quotes: {as_typed(f'{key}={quoted(value)}')}"
    return ""


def _parse(text: str) -> Override | None:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        return parser.parse_override(text)
    except HydraException:
        return None


def _as_option(config_class: type[Any], text: str) -> str:
    """Say how to write `optim.lr: 1`, `optim.lr 1` or a bare `optim.lr`, if it is an option."""
    key, value = re.split(r"[:\s]+", f"{text} ", maxsplit=1)
    try:
        find_option(config_class, key)
    except UserError:
        return ""
    return f"; write {key}={value.strip() or 'VALUE'}"


class Checked(NamedTuple):
    """Overrides that name something, by what applies them."""

    choices: list[str]
    """Choices of groups, in Hydra's terms: Hydra composes them."""
    options: list[Override]
    """The others, in their order: set in what Hydra composed."""


def check(presets: Presets, overrides: Sequence[str]) -> Checked:
    """Check that each override names an option or a preset."""
    choices: dict[str, str] = {}
    options: list[Override] = []
    for text in overrides:
        override = parse_override(presets.command.config_class, text)
        _refuse(override)
        key, value = override.key_or_group, override.value()
        if (choice := _choice(presets, override)) is None:
            find_option(presets.command.config_class, key, groups=presets.groups)
            options.append(override)
        else:
            choices.pop(key, None)  # given again, it wins over all before
            if value is not None:
                choices[key] = choice
    return Checked(list(choices.values()), options)


def _refuse(override: Override) -> None:
    key = override.key_or_group
    if "_target_" in key.split("."):  # in a value, it is found in what is composed
        raise UserError(f"{override.input_line!r}: _target_ is refused: a config never names code")
    if key.replace("/", ".").split(".")[0] == "hydra":
        raise UserError(f"{key} would change nothing: jobs do not run inside Hydra; leave it out")


def _choice(presets: Presets, override: Override) -> str | None:
    """Return the choice of a group in Hydra's terms, or None for an override of an option."""
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise UserError(f"{override.input_line}: a preset's place (@) is fixed; leave it out")
    is_option = isinstance(value, dict) or override.type is OverrideType.DEL
    if key not in presets.groups or is_option:
        return None
    command, choices = presets.command, presets.groups[key]
    may_be_none = key in (command.preset_group, SCALE)
    if not (value is None and may_be_none) and value not in choices:
        shown = show_value(value)
        there = did_you_mean(nearest(shown, choices), choices, "choices")
        raise UserError(f"{key}={shown} is not a choice{there}")
    return f"{key}={show_value(value)}"
