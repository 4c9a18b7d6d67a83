"""Overrides: taken apart, checked against schema and presets, and put into Hydra's terms.

A user writes `option=value` for everything: entries of a mapping need no `+`, and the first word
may be a preset's name. A mistake is answered with the nearest name that exists.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from largebatch.commands.options import find_option, nearest
from largebatch.commands.presets import Presets
from largebatch.errors import UserError


def expand_preset(presets: Presets, overrides: Sequence[str]) -> list[str]:
    """Write a bare word in first place out: `quickstart` as `experiment=quickstart`."""
    if not overrides or "=" in overrides[0] or overrides[0].startswith(("~", "+")):
        return list(overrides)
    word, *others = overrides
    command = presets.command
    choices = presets.groups.get(command.preset_group, [])
    if not choices:
        raise UserError(f"{word!r} is not option=value, and {command.name} has no presets")
    for name in word.split(","):
        if name not in choices:
            raise UserError(f"{name!r} is not a preset of {command.name}{_allowed(name, choices)}")
    return [f"{command.preset_group}={word}", *others]


def expand(overrides: Sequence[str], *, multirun: bool) -> list[tuple[list[str], str]]:
    """Return, for each job, its overrides and what sets it apart (`optim.lr=0.1,seed=1`).

    Without `multirun` there is one job, and an option with several values is an error.
    """
    choices: list[list[tuple[str, str]]] = []
    for text in overrides:
        override = parse_override(text)
        if not override.is_sweep_override():
            choices.append([(text, "")])
        elif not multirun:
            raise UserError(
                f"{text!r} has several values; add -m to run once for each, "
                "or write a list as [a,b] and a text with commas in quotes"
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


def parse_override(text: str) -> Override:
    """Parse one override with Hydra's grammar, or raise a one-line UserError."""
    if "=" not in text and not text.startswith("~"):
        raise UserError(f"{text!r} is not option=value")
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        return parser.parse_override(text)
    except HydraException as error:
        reason = str(error.__cause__ or error).splitlines()[0].partition(" expecting")[0]
        if reason.startswith("LexerNoViableAltException"):
            reason = "a character that must be quoted"
        raise UserError(
            f"{text!r} cannot be read as option=value ({reason}); put a value with special "
            f"characters in quotes: {text.partition('=')[0]}=\"'...'\""
        ) from error


def quote(value: str) -> str:
    """Quote a text so that Hydra reads it back as it is."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


class Translated(NamedTuple):
    """Overrides as Hydra wants them."""

    overrides: dict[str, Override]
    """By Hydra's text: what the user wrote."""
    debug: bool | None
    """The option `debug`, which Hydra would take for a choice of the group debug/."""


def translate(presets: Presets, overrides: Sequence[str]) -> Translated:
    """Check that each override names an option or a preset, and put it into Hydra's terms."""
    translated: dict[str, Override] = {}
    debug: bool | None = None
    for text in overrides:
        override = parse_override(text)
        _refuse(override)
        if override.key_or_group == "debug" and isinstance(override.value(), bool):
            debug = bool(override.value())
        else:
            hydras = _translate(presets, override)
            translated.pop(hydras, None)  # given again, it must win over what stands between
            translated[hydras] = override
    return Translated(translated, debug)


def names_code(value: Any) -> bool:
    """Whether a value holds the key with which Hydra would call any function."""
    if isinstance(value, dict):
        return any(str(k) == "_target_" or names_code(v) for k, v in value.items())
    return isinstance(value, list) and any(map(names_code, value))


def _refuse(override: Override) -> None:
    key = override.key_or_group
    if "_target_" in key.split(".") or names_code(override.value()):
        raise UserError(f"{override.input_line!r}: _target_ is refused: a config never names code")
    if key.replace("/", ".").split(".")[0] == "hydra":
        raise UserError(f"{key} would change nothing: jobs do not run inside Hydra; leave it out")


def _translate(presets: Presets, override: Override) -> str:
    """Check an override, and return it as Hydra wants it: with ++ where it adds an entry."""
    command, groups = presets.command, presets.groups
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise UserError(f"{override.input_line}: a preset's place (@) is fixed; leave it out")
    if key in groups and not isinstance(value, dict) and override.type is not OverrideType.DEL:
        _check_choice(key, value, groups[key])
        # A preset group need not stand in the defaults list of the primary config.
        listed = key != command.preset_group or presets.lists_preset_group
        return f"{'' if listed else '+'}{key}={override.get_value_element_as_str()}"
    place = find_option(command.config_class, key, groups=groups)
    if key == "debug":
        raise UserError(f"debug={value} must be true or false")
    _check_entries(command.config_class, key, value)
    if override.type is OverrideType.DEL:
        if place.mapping_key is None:
            raise UserError(f"{override.input_line}: only entries of a mapping can be removed")
        return str(override.input_line)
    if place.mapping_key is None:
        return f"{key}={override.get_value_element_as_str()}"
    nested = override.get_value_element_as_str()
    for part in reversed(place.entry):
        nested = "{" + f"{part}: {nested}" + "}"
    return f"++{place.mapping_key}={nested}"


def _check_choice(group: str, value: Any, choices: Sequence[str]) -> None:
    if value is not None and str(value) not in choices:
        allowed = ["true", "false", *choices] if group == "debug" else choices
        raise UserError(f"{group}={value} is not a choice{_allowed(str(value), allowed)}")


def _check_entries(config_class: type[Any], key: str, value: Any) -> None:
    """Check the keys of a mapping that is set whole: optim={lr: 1e-4}."""
    if isinstance(value, dict):
        for name, entry in value.items():
            find_option(config_class, f"{key}.{name}")
            _check_entries(config_class, f"{key}.{name}", entry)


def _allowed(value: str, choices: Sequence[str]) -> str:
    near = nearest(value, choices)
    return f"{f'; did you mean {near}?' if near else ''} (choices: {', '.join(choices)})"
