"""Where a run's numbers go: `metrics.jsonl` (the truth), the console, and wandb."""

import json
import math
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from rich.console import Console

from largebatch.config import LoggerConfig
from largebatch.errors import UserError
from largebatch.files import write_text, writing
from largebatch.train.console import evaluation_lines, header_line, step_line

if TYPE_CHECKING:
    import wandb

METRICS_FILE = "metrics.jsonl"
_WANDB_FILE = "wandb_run.json"
_LINES_PER_HEADER = 25


class RunLog:
    """The log of one run; a context manager, used on rank 0 only.

    `metrics.jsonl` in `folder` gets one JSON object a line, at once; a number that is not finite is
    written as null. Entries of an earlier process with a step of `first_step` (the smallest step
    that will be logged now) or more are dropped, and so is a last line that a kill cut short: a
    resumed run has each step once. wandb continues the earlier process's run, under the id in
    `wandb_run.json`; once it has started, its failures are told in one line and stop nothing.

    Raises `UserError` on entering if `logger.wandb=online` and wandb cannot be reached with an
    account, and if `metrics.jsonl` is damaged elsewhere than in its last line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: LoggerConfig,
        run_name: str,
        settings: Mapping[str, Any],
        first_step: int,
        max_steps: int,
    ) -> None:
        self._folder = folder
        self._path = folder / METRICS_FILE
        self._config = config
        self._run_name = run_name
        self._settings = settings
        self._max_steps = max_steps
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._num_lines = 0
        self._file: IO[str] | None = None
        self._wandb: _WandbRun | None = None
        drop_entries(folder / METRICS_FILE, lambda entry: entry["step"] >= first_step)

    def __enter__(self) -> Self:
        if self._config.wandb != "disabled":
            self._wandb = _WandbRun(
                self._folder,
                online=self._config.wandb == "online",
                project=self._config.project,
                run_name=self._run_name,
                settings=self._settings,
                console=self._console,
            )
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            # What a full disk has not taken, it takes at the end no more.
            with writing(self._path) if error is None else suppress(OSError):
                self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)
            self._wandb = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values`, named as in `train/loss` or `eval/<set>/ndcg@10`, under `step`."""
        assert self._file is not None, "RunLog.log outside its with block"
        entry = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        with writing(self._path):
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
        self._print(step, values)
        if self._wandb is not None:
            self._wandb.log(step, values)

    def _print(self, step: int, values: Mapping[str, float]) -> None:
        if any(name.startswith("train/") for name in values):
            if self._num_lines % _LINES_PER_HEADER == 0:
                self._console.print(header_line(self._max_steps, values), style="bold")
            self._num_lines += 1
            self._console.print(step_line(step, self._max_steps, values))
        for line in evaluation_lines(step, self._max_steps, values):
            self._console.print(line, style="green")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a `metrics.jsonl`, without a last line that a kill cut short.

    A file that is not there has no entries. Raises `UserError` for any other line that is not an
    entry.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what no newline ends is empty, or torn
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            raise UserError(
                f"{path}, line {number} is not a JSON object with a step; remove that line"
            )
    return entries


def drop_entries(path: Path, unwanted: Callable[[dict[str, Any]], bool]) -> None:
    """Take entries out of a `metrics.jsonl`, and a last line that a kill cut short.

    Raises `UserError` as `read_metrics` does, or if the file can't be written.
    """
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(path) if not unwanted(entry)]
    write_text(path, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in kept))


def _json_number(value: float) -> float | None:
    """Return a plain number, as JSON knows no numpy or torch scalars, nor NaN."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _log_in(options: "wandb.Settings", cure: str) -> None:
    import wandb

    wandb.setup(options)
    if not wandb.login(prompt=False, verify=False):
        raise UserError(f"logger.wandb=online needs an account and found no key: {cure}")


class _WandbRun:
    """One process's part of a wandb run."""

    def __init__(
        self,
        folder: Path,
        *,
        online: bool,
        project: str,
        run_name: str,
        settings: Mapping[str, Any],
        console: Console,
    ) -> None:
        self._folder = folder
        self._online = online
        self._console = console
        self._run: wandb.Run | None = self._start(project, run_name, settings)
        if online:
            console.print(f"wandb: {self._run.url}")
        else:
            console.print(f"wandb: offline; to send the run later: {self._sync_command()}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **values})
        except Exception as error:  # wandb's own process may end in many ways; training goes on
            self._give_up(error)

    def finish(self, *, failed: bool) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(error)

    def _start(self, project: str, run_name: str, settings: Mapping[str, Any]) -> "wandb.Run":
        import wandb

        # Without limits wandb retries for a week where there is no network, and then blocks exit.
        options = wandb.Settings(
            mode="online" if self._online else "offline",
            silent=True,
            console="off",
            init_timeout=60,
            finish_timeout=60,
            x_graphql_retry_max=4,
            x_graphql_retry_wait_min_seconds=0.5,
            x_graphql_retry_wait_max_seconds=4,
            x_graphql_timeout_seconds=10,
        )
        cure = (
            "log in by `wandb login` or set WANDB_API_KEY, or choose logger.wandb=offline"
            if self._online
            else "choose logger.wandb=disabled"
        )
        try:
            if self._online:
                _log_in(options, cure)
            run = wandb.init(
                project=project,
                name=run_name,
                id=self._run_id(),
                resume="allow",
                dir=str(self._folder),
                config=dict(settings),
                allow_val_change=True,
                settings=options,
            )
        except UserError:
            raise
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"logger.wandb={options.mode}: wandb did not start ({reason}): {cure}"
            ) from error
        except ValueError as error:  # pydantic's: wandb reads the environment's WANDB_* by itself
            reason = " ".join(str(error).split(" [type=")[0].split())
            raise UserError(
                f"logger.wandb={options.mode}: wandb did not start ({reason}): unset or mend the "
                "variables WANDB_* of this shell, or choose logger.wandb=disabled"
            ) from error
        run.define_metric("step", hidden=True)
        # All of them, so that no name that is logged one day is drawn over wandb's own counter.
        run.define_metric("*", step_metric="step")
        return run

    def _run_id(self) -> str:
        """Return the id that all processes of this run share, made by the first of them."""
        path = self._folder / _WANDB_FILE
        if not path.exists():
            write_text(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        try:
            return str(json.loads(path.read_bytes())["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path} does not hold {{"id": ...}}; delete it to begin a new wandb run'
            ) from error

    def _sync_command(self) -> str:
        return f"wandb sync {self._folder / 'wandb'}/*run-*"

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        self._console.print(
            f"wandb: stopped ({reason}); training goes on, all numbers are in {METRICS_FILE}, and "
            f"what wandb has stored is sent by: {self._sync_command()}"
        )
