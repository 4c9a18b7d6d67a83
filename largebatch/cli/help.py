"""The texts of `largebatch --help` and `largebatch COMMAND --help`."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from largebatch.cli.flags import FLAGS
from largebatch.cli.options import Option, list_options, name_type, num_own_options
from largebatch.cli.table import COMMANDS, actions_of

if TYPE_CHECKING:
    from largebatch.cli.presets import Presets


def general_help() -> str:
    """List the commands. Needs nothing but the schema, so it is instant."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "largebatch: pre-train text-embedding models with very large contrastive batches.",
            "",
            "Usage: largebatch COMMAND [PRESET] [OPTION=VALUE ...]",
            "",
            "Commands:",
            *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            "First steps:",
            "  largebatch pairs code         make pairs from the Python code on this machine",
            "  largebatch train quickstart   train on it, with evaluation and export",
            "",
            "`largebatch COMMAND --help` explains every option; `largebatch --version` says which.",
        ]
    )


def actions_help(name: str) -> str:
    """List what a command of several actions can do."""
    actions = actions_of(name)
    width = max(map(len, actions))
    return "\n".join(
        [
            f"Usage: largebatch {name} ACTION [PRESET] [OPTION=VALUE ...]",
            "",
            "Actions:",
            *(f"  {a:<{width}}  {COMMANDS[f'{name} {a}'].summary}" for a in actions),
            "",
            "Examples:",
            *(
                f"  largebatch {name} {action} {COMMANDS[f'{name} {action}'].examples[0]}"
                for action in actions
            ),
            "",
            f"`largebatch {name} ACTION --help` explains every option.",
        ]
    )


def command_help(presets: "Presets", overrides: Sequence[str]) -> str:
    """Explain a command: examples, presets, groups, and each option with its value here."""
    from omegaconf import OmegaConf

    from largebatch.cli.compose import compose

    command = presets.command
    config = compose(presets, overrides)
    groups = dict(presets.groups)
    names = groups.pop(command.preset_group, [])
    has_presets = " [PRESET]" if names else ""
    lines = [
        f"largebatch {command.name}: {command.summary}",
        "",
        f"Usage: largebatch {command.name}{has_presets} [OPTION=VALUE ...] [FLAGS]",
        "",
        "Examples:",
        *(f"  largebatch {command.name} {example}" for example in command.examples),
    ]
    options = list(list_options(command.config_class))
    # What it adds to another command's options is told first.
    own = options[: num_own_options(command.config_class)]
    others = "Options of the run, as for `largebatch train`" if own else "Options"
    if own:
        lines += ["", "Options of its own (type, value without further arguments in brackets):"]
        for option in own:
            lines += _option(option, OmegaConf.select(config, option.key, throw_on_missing=False))
    if names:
        lines += ["", f"Presets (the word after {command.name}, or {command.preset_group}=PRESET):"]
        lines += [_entry(name, presets.describe(command.preset_group, name)) for name in names]
    if groups:
        lines += ["", "Groups (GROUP=CHOICE sets several options of that name at once):"]
        for group, choices in groups.items():
            lines += [
                f"  {group}=",
                *(_entry(f"  {c}", presets.describe(group, c)) for c in choices),
            ]
    lines += ["", f"{others} (type, value without further arguments in brackets):"]
    for option in options[len(own) :]:
        lines += _option(option, OmegaConf.select(config, option.key, throw_on_missing=False))
    lines += ["", "Flags:", *(_entry(flag, text) for flag, text in FLAGS.items())]
    return "\n".join(lines)


def _option(option: Option, value: Any) -> list[str]:
    indent = " " * 6
    return [
        f"  {option.key}  {name_type(option.annotation)}  [{_show(value)}]",
        *textwrap.wrap(
            option.documentation, _width(), initial_indent=indent, subsequent_indent=indent
        ),
    ]


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or "''"


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        f"  {name:<22} {text}", _width(), subsequent_indent=" " * 25, drop_whitespace=True
    )


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)
