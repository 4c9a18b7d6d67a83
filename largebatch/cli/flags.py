"""The flags of a command line, apart from the overrides."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from largebatch.cli.options import find_option
from largebatch.config.checks import nearest
from largebatch.errors import UserError

FLAGS = {
    "--help": "show this text",
    "--multirun": "(-m) run once for each combination of values: optim.lr=1e-4,2e-4",
    "--cfg": "(-c) job: show the composed config instead of running",
    "--resolve": "with --cfg: show references such as ${name} as the values they stand for",
    "--package": "(-p) with --cfg: show only this part, such as optim",
    "--info": "(-i) Hydra's report on how the config came about: defaults, defaults-tree, ...",
    "--config-dir": "(-cd) a folder with presets of your own, laid out like conf/",
}
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Line(NamedTuple):
    """A command line after the command's name, taken apart."""

    overrides: list[str]
    help: bool
    multirun: bool
    cfg: str | None
    resolve: bool
    package: str | None
    info: str | None
    config_dir: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_line(arguments: Sequence[str], config_class: type[Any]) -> Line:
    """Separate flags from overrides; raise UserError for a flag that does not exist.

    `config_class` knows of the options, for those who write them with dashes.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job",))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=INFOS)
    parser.add_argument("-cd", "--config-dir", type=Path)
    found, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]} is not a flag; {_hint(unknown[0], arguments, config_class)}")
    if (found.resolve or found.package) and not found.cfg:
        raise UserError("--resolve and --package say how --cfg shows the config; add --cfg job")
    if found.config_dir and not found.config_dir.is_dir():
        raise UserError(f"--config-dir {found.config_dir} is not a folder")
    return Line(**vars(found))


def _hint(flag: str, arguments: Sequence[str], config_class: type[Any]) -> str:
    word, equals, value = flag.partition("=")
    key = word.lstrip("-").replace("-", "_")
    if not equals:
        after = arguments[list(arguments).index(flag) + 1 :]
        value = after[0] if after and not after[0].startswith("-") else "VALUE"
    try:
        find_option(config_class, key)
    except UserError as unknown:
        if near := nearest(word.lstrip("-"), [known.lstrip("-") for known in FLAGS]):
            return f"did you mean --{near}?"
        return f"there are {', '.join(FLAGS)}" if len(key) < 2 else f"and {unknown}"
    return f"options have no dashes: {key}={value}"
