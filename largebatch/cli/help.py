"""The texts of `largebatch --help` and `largebatch COMMAND --help`."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from largebatch.cli.flags import FLAGS
from largebatch.cli.options import Option, list_options, name_type, num_own_options
from largebatch.cli.table import COMMANDS, actions_of

if TYPE_CHECKING:
    from largebatch.cli.presets import Presets


def general_help() -> str:
    """List the commands. Needs nothing but the schema, so it is instant."""
    steps = {
        "largebatch pairs code": "make pairs from the Python code on this machine",
        "largebatch train quickstart": "train on it, with evaluation and export",
    }
    return "\n".join(
        [
            "largebatch: pre-train text-embedding models with very large contrastive batches.",
            "",
            "Usage: largebatch COMMAND [PRESET] [OPTION=VALUE ...]",
            *_section("Commands", _columns({n: c.summary for n, c in COMMANDS.items()})),
            *_section("First steps", _columns(steps)),
            "",
            "`largebatch COMMAND --help` explains every option; `largebatch --version` says which.",
        ]
    )


def actions_help(name: str) -> str:
    """List what a command of several actions can do."""
    commands = {action: COMMANDS[f"{name} {action}"] for action in actions_of(name)}
    examples = [f"  largebatch {c.name} {c.examples[0]}" for c in commands.values()]
    return "\n".join(
        [
            f"Usage: largebatch {name} ACTION [PRESET] [OPTION=VALUE ...]",
            *_section("Actions", _columns({a: c.summary for a, c in commands.items()})),
            *_section("Examples", examples),
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
    options = list(list_options(command.config_class))
    texts = [_option(o, OmegaConf.select(config, o.key, throw_on_missing=False)) for o in options]
    # What it adds to another command's options is told first.
    num_own = num_own_options(command.config_class)
    of_run = "Options of the run, as for `largebatch train`" if num_own else "Options"
    legend = "(type, value without further arguments in brackets)"
    groups = dict(presets.groups)
    names = groups.pop(command.preset_group, [])
    preset = " [PRESET]" if names else ""
    choices = [
        line
        for group, choices in groups.items()
        for line in (
            f"  {group}=",
            *(_entry(f"  {choice}", presets.describe(group, choice)) for choice in choices),
        )
    ]
    return "\n".join(
        [
            f"largebatch {command.name}: {command.summary}",
            "",
            f"Usage: largebatch {command.name}{preset} [OPTION=VALUE ...] [FLAGS]",
            *_section("Examples", (f"  largebatch {command.name} {e}" for e in command.examples)),
            *_section(f"Options of its own {legend}", texts[:num_own]),
            *_section(
                f"Presets (the word after {command.name}, or {command.preset_group}=PRESET)",
                (_entry(name, presets.describe(command.preset_group, name)) for name in names),
            ),
            *_section("Groups (GROUP=CHOICE sets several options of that name at once)", choices),
            *_section(f"{of_run} {legend}", texts[num_own:]),
            *_section("Flags", (_entry(flag, text) for flag, text in FLAGS.items())),
        ]
    )


def _section(title: str, lines: Iterable[str]) -> list[str]:
    """Return an empty line, the title and the lines; nothing if there are none."""
    found = list(lines)
    return ["", f"{title}:", *found] if found else []


def _columns(texts: Mapping[str, str]) -> list[str]:
    width = max(map(len, texts))
    return [f"  {name:<{width}}  {text}" for name, text in texts.items()]


def _option(option: Option, value: Any) -> str:
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    indent = " " * 6
    text = textwrap.fill(
        option.documentation, _width(), initial_indent=indent, subsequent_indent=indent
    )
    shown = "''" if value == "" else value
    return f"  {option.key}  {name_type(option.annotation)}  [{shown}]\n{text}"


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        f"  {name:<22} {text}", _width(), subsequent_indent=" " * 25, drop_whitespace=True
    )


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)
