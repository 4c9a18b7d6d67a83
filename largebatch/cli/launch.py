"""Start the ranks of a run on this machine, with torch's elastic launcher (torchrun's engine).

The launcher watches its processes, ends all when one fails, and passes signals on. Its own report
is replaced by one line. It gives a rank 30 seconds after SIGTERM, so a rank must not outlive that
signal: nothing here handles it, and Python's default ends the process at once, even inside a
collective.
"""

import atexit
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from largebatch.cli.failures import LAUNCHED, Failure, RanksFailed, read_error_file
from largebatch.config import HardwareConfig
from largebatch.world import World, num_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_LOOK_EVERY_S = 0.5


def launch(entrypoint: Sequence[str], *, ranks: int, threads: int = 0) -> None:
    """Run `entrypoint` as `ranks` processes and return when all have succeeded.

    `threads` is the number of CPU threads of each; 0 shares the cores out. Raises RanksFailed for
    the first rank that fails, and KeyboardInterrupt after Ctrl-C, in both cases after every rank
    has ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    program, *arguments = entrypoint
    with (
        _quiet_logs(),
        _restored_signals(),
        _environment(_rank_environment(ranks, threads)),
        tempfile.TemporaryDirectory(prefix="largebatch-") as folder,
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="largebatch",
            max_restarts=0,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"is_host": True},
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, program)(*arguments)
        except ChildFailedError as error:
            raise first_failure(error.failures) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            name = signal.Signals(error.sigval).name
            raise RanksFailed(f"stopped by {name}; all ranks were ended") from None


def prepare_machine(hardware: HardwareConfig, *, deepspeed: bool) -> None:
    """See that each rank has its device, and build what DeepSpeed compiles, before ranks start.

    Raises:
        UserError: There are no such devices, or DeepSpeed's extension can't be built.
    """
    from largebatch.parallel.process_group import choose_device

    last = hardware.ranks - 1
    device = choose_device(hardware.device, World(last, hardware.ranks, last))
    if deepspeed:
        from largebatch.parallel.deepspeed_build import prepare

        prepare(device)


def first_failure(failures: "dict[int, ProcessFailure]") -> RanksFailed:
    """Find the cause among ranks that failed, most of which only lost their connection to it.

    The user's mistake comes first, then a kill (a killed rank writes nothing, and the others'
    errors follow from its death), then the earliest error. Ranks that the launcher ended with
    SIGTERM are never the cause.
    """
    written: dict[int, Failure] = {}
    for rank, process in failures.items():
        if found := read_error_file(process.error_file):
            written[rank] = found
    by_time = sorted(written.items(), key=lambda item: item[1].time_s)
    for _, found in by_time:
        if found.is_user_error:
            return RanksFailed(found.line, found.trace)
    for rank, process in sorted(failures.items()):
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = process.signal_name()
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return RanksFailed(f"rank {rank} was ended by {name}{hint}")
    for rank, found in by_time:
        return RanksFailed(f"rank {rank}: {found.line}", found.trace)
    rank, process = min(failures.items(), key=lambda item: (item[1].exitcode < 0, item[0]))
    if process.exitcode < 0:
        return RanksFailed(f"rank {rank} was ended by {process.signal_name()}")
    return RanksFailed(f"rank {rank} ended with exit code {process.exitcode} and wrote no error")


def prepare_rank() -> None:
    """Make Ctrl-C end this rank at once and silently, even inside a collective.

    It also ends when its launcher was killed, which can't pass that on: it would train on unseen,
    and keep the run folder locked. Warnings of ours come from rank 0 alone, but for those of memory
    that ran out, which is each rank's own.
    """
    if LAUNCHED in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        over = threading.Event()
        watch = threading.Thread(
            target=_end_with, args=(int(os.environ[LAUNCHED]), over), daemon=True
        )
        watch.start()
        # No thread of ours may be about when the interpreter is taken down.
        atexit.register(watch.join, 1)
        atexit.register(over.set)  # the last one registered is called first
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("largebatch").setLevel(logging.ERROR)
        logging.getLogger("largebatch.step.memory").setLevel(logging.WARNING)


def _end_with(launcher: int, over: threading.Event) -> None:
    while not over.wait(_LOOK_EVERY_S):
        if os.getppid() != launcher:
            os._exit(1)


def _rank_environment(ranks: int, threads: int) -> dict[str, str]:
    wanted = {LAUNCHED: str(os.getpid())}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(threads or max(1, num_cores() // ranks))
    return wanted


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Undo the handlers that the elastic launcher leaves behind."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the elastic launcher's own log lines off the terminal; failures are told in one."""
    logger = logging.getLogger("torch.distributed")
    propagate, handlers = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.propagate, logger.handlers = propagate, handlers
