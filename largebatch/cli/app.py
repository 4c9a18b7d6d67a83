"""The command line: `largebatch COMMAND [PRESET] [OPTION=VALUE ...] [FLAGS]`.

1. Take the line apart, and answer `--help` and `--version`.
2. Compose and check the config of every job, before the first one starts.
3. Run each job: in this process, or as several ranks that this process starts and watches.
Whatever fails ends with one line on stderr and exit code 1.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from largebatch.cli.failures import is_rank, report
from largebatch.cli.flags import Line, parse_line
from largebatch.cli.launch import launch, prepare_rank
from largebatch.cli.options import nearest
from largebatch.cli.table import COMMANDS, Command, actions_of
from largebatch.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from largebatch.cli.presets import Presets

INTERRUPTED = 130


class Job(NamedTuple):
    """One run of a command."""

    label: str
    """What sets it apart from the other jobs of a sweep; empty outside a sweep."""
    overrides: list[str]
    """Compose these again and the result is `config`."""
    config: Any
    """The dataclass of the command."""


def main(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit code."""
    # The deepspeed launcher adds --local_rank=N, which torch's LOCAL_RANK says as well.
    arguments = [a for a in arguments if not re.fullmatch(r"--local[_-]rank=\d+", a)]
    prepare_rank()
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        report(error, debug="debug=true" in arguments)
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    from largebatch.cli.help import actions_help, general_help

    name, *rest = arguments or ["--help"]
    if actions := actions_of(name):
        if rest and rest[0] in ("-h", "--help"):
            print(actions_help(name))
            return 0
        name, rest = f"{name} {_action(name, rest, actions)}", rest[1:]
    if name in ("-h", "--help", "help"):
        print(general_help())
    elif name == "--version":
        from importlib.metadata import version

        print(f"largebatch {version('largebatch')}")
    elif name in COMMANDS:
        return _run_command(COMMANDS[name], parse_line(rest, COMMANDS[name].config_class))
    else:
        near = nearest(name, COMMANDS)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"{name!r} is not a command{hint} (commands: {', '.join(COMMANDS)})")
    return 0


def _action(name: str, rest: Sequence[str], actions: Sequence[str]) -> str:
    """Return the action of a command that has several."""
    word = rest[0] if rest else ""
    if word not in actions:
        says = f"{word!r} is no action of {name}" if word else f"{name} needs an action"
        forms = " or ".join(f"`largebatch {name} {action} ...`" for action in actions)
        raise UserError(f"{says}: {forms}")
    return word


def _run_command(command: Command, line: Line) -> int:
    # Hydra takes a tenth of a second to import, which `largebatch --help` is spared.
    from largebatch.cli import compose
    from largebatch.cli import overrides as given
    from largebatch.cli.presets import open_presets

    with open_presets(command, line.config_dir) as presets:
        overrides = given.expand_preset(presets, line.overrides)
        if line.help:
            from largebatch.cli.help import command_help

            print(command_help(presets, overrides))
            return 0
        if line.cfg or line.info:
            for texts, label in given.expand(presets, overrides, multirun=line.multirun):
                if label:
                    print(f"# {label}")
                compose.show(presets, texts, line)
            return 0
        jobs = plan_jobs(presets, overrides, multirun=line.multirun)
    for number, job in enumerate(jobs, start=1):
        if job.label:
            print(f"[{number}/{len(jobs)}] {job.label}", flush=True)
        try:
            _run_job(command, job, line.config_dir)
        except Exception as error:
            report(error, debug=job.config.debug)
            return 1
    return 0


def plan_jobs(presets: "Presets", overrides: Sequence[str], *, multirun: bool) -> list[Job]:
    """Compose and check all jobs of a command line; raise UserError for the first wrong one."""
    from largebatch.cli.compose import build, compose
    from largebatch.cli.overrides import expand

    if multirun and is_rank():
        raise UserError("-m under a launcher would mix up its ranks; use -m with hardware.ranks=N")
    expanded = expand(presets, overrides, multirun=multirun)
    labels = [label for _, label in expanded]
    texts = [list(texts) for texts, _ in expanded]
    configs = [compose(presets, job) for job in texts]
    built = [build(config) for config in configs]
    if len(configs) > 1:
        own_folders = _own_folders(configs, labels, presets.command.folder_option)
        texts = [[*job, *own] for job, own in zip(texts, own_folders, strict=True)]
        built = [build(compose(presets, job)) for job in texts]
    return [Job(*parts) for parts in zip(labels, texts, built, strict=True)]


def _own_folders(
    configs: "Sequence[DictConfig]", labels: Sequence[str], option: str | None
) -> list[list[str]]:
    """Return overrides that give each job of a sweep a folder (and a run a name) of its own.

    `option` is what names the folder. Jobs that have different folders already, because the sweep
    is over it or over something that it refers to, keep them.
    """
    from largebatch.cli.quoting import quoted

    if option is None or option not in configs[0]:
        return [[] for _ in configs]
    folders = [str(config[option]) for config in configs]
    if len(set(folders)) == len(folders):
        return [[] for _ in configs]
    own = []
    for config, folder, label in zip(configs, folders, labels, strict=True):
        part = re.sub(r"[^\w.,=+-]", "_", label)
        own.append([f"{option}={quoted(f'{folder}/{part}')}"])
        if option == "output_dir" and "name" in config:
            own[-1].append(f"name={quoted(f'{config.name}/{part}')}")
    return own


def _build_extension(device: str) -> None:
    """Build what DeepSpeed compiles, before ranks start and while nothing waits for it."""
    from largebatch.parallel.deepspeed_build import prepare
    from largebatch.parallel.process_group import choose_device
    from largebatch.world import World

    prepare(choose_device(device, World()))


def _run_job(command: Command, job: Job, config_dir: Path | None) -> None:
    if command.starts_ranks and job.config.hardware.ranks > 1 and not is_rank():
        own_presets = ["--config-dir", str(config_dir)] if config_dir else []
        if job.config.strategy.name == "deepspeed":
            _build_extension(job.config.hardware.device)
        launch(
            [sys.executable, "-m", "largebatch", command.name, *job.overrides, *own_presets],
            ranks=job.config.hardware.ranks,
            threads=job.config.hardware.threads,
        )
    else:
        command.run(job.config)
