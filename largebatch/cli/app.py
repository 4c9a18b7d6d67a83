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
from largebatch.cli.launch import launch, prepare_machine, prepare_rank
from largebatch.cli.options import did_you_mean
from largebatch.cli.table import COMMANDS, Command, actions_of
from largebatch.config.checks import nearest
from largebatch.errors import UserError

if TYPE_CHECKING:
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
        there = did_you_mean(nearest(name, COMMANDS), COMMANDS, "commands")
        raise UserError(f"{name!r} is not a command{there}")
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
    """Compose and check all jobs of a command line; raise UserError for the first wrong one.

    Jobs of a sweep get a folder, and a run a name, of their own, unless their folders differ
    already because the sweep is over them or over something that they refer to.
    """
    from largebatch.cli.compose import build, compose
    from largebatch.cli.overrides import expand

    def plan(label: str, texts: list[str]) -> Job:
        return Job(label, texts, build(presets.command.config_class, compose(presets, texts)))

    if multirun and is_rank():
        raise UserError("-m under a launcher would mix up its ranks; use -m with hardware.ranks=N")
    option = presets.command.folder_option
    jobs = [plan(label, texts) for texts, label in expand(presets, overrides, multirun=multirun)]
    # Where a command has no such option, labels stand in, which differ.
    if option is None or len({getattr(job.config, option, job.label) for job in jobs}) == len(jobs):
        return jobs
    return [plan(job.label, [*job.overrides, *_own_folder(job, option)]) for job in jobs]


def _own_folder(job: Job, option: str) -> list[str]:
    """Return overrides that give a job of a sweep a folder of its own, which `option` names."""
    from largebatch.cli.quoting import quoted

    part = re.sub(r"[^\w.,=+-]", "_", job.label)
    folder = getattr(job.config, option)
    own = [f"{option}={quoted(part if folder is None else f'{folder}/{part}')}"]
    if option == "output_dir" and hasattr(job.config, "name"):
        own.append(f"name={quoted(f'{job.config.name}/{part}')}")
    return own


def _run_job(command: Command, job: Job, config_dir: Path | None) -> None:
    if command.starts_ranks and job.config.hardware.ranks > 1 and not is_rank():
        own_presets = ["--config-dir", str(config_dir)] if config_dir else []
        prepare_machine(job.config.hardware, deepspeed=job.config.strategy.name == "deepspeed")
        launch(
            [sys.executable, "-m", "largebatch", command.name, *job.overrides, *own_presets],
            ranks=job.config.hardware.ranks,
            threads=job.config.hardware.threads,
        )
    else:
        command.run(job.config)
