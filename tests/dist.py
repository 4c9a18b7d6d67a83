"""Run a plain function on several ranks (gloo over loopback), as in `run_ranks(fn, 2)`.

Ranks are forked from the test's process, so closures and large arguments cost nothing, and two
ranks start in a few hundredths of a second.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import IO, Any, NamedTuple

import torch
from torch.distributed import TCPStore, destroy_process_group, init_process_group

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
GRACE_S = 2.0
"""How long the other ranks may go on after one failed."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 240.0,
    init_group: bool = True,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks and return each rank's result, in rank order.

    Every rank is a process with one torch thread, the environment that torchrun sets (RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...) and a gloo group; with `init_group=False` the function
    starts the group itself. Tensors in the result come back as numpy arrays (bfloat16 as float32);
    anything else must pickle.

    Raises the exception of the rank that failed first, with each failed rank's traceback as a note;
    RuntimeError if a rank died without a word; TimeoutError, with the place where each rank hangs,
    after `timeout_s`. No rank outlives the call.
    """
    assert not torch.cuda.is_initialized(), "a process that holds a GPU cannot be forked"
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        ranks: list[_Rank] = []
        starts: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            stack.callback(receiver.close)
            start_receiver, start = context.Pipe(duplex=False)
            stack.callback(start.close)
            stack_file = stack.enter_context(tempfile.TemporaryFile("w+"))
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                # The store lives here, as it lives in torchrun's agent: no port can be taken twice.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "GLOO_SOCKET_IFNAME": LOOPBACK,
            }
            process = context.Process(
                target=_run_rank,
                args=(
                    fn,
                    args,
                    environment,
                    start_receiver,
                    sender,
                    stack_file,
                    timeout_s,
                    init_group,
                ),
            )
            with warnings.catch_warnings(), _no_collection():
                # Python 3.12 warns of forking beside threads; ranks use none of the parent's.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            stack.callback(_kill, process)
            sender.close()
            start_receiver.close()
            starts.append(start)
            ranks.append(_Rank(process, receiver, stack_file))
        # Only now, for the store has a thread: a lock that it held would stay locked in a rank that
        # was forked at that instant.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for start in starts:
            with suppress(BrokenPipeError):  # a rank that died already: found out below
                start.send(store.port)
        outcomes = _collect(ranks, timeout_s)
        _raise_failure(ranks, outcomes, timeout_s)
    return [outcomes[rank].result for rank in range(world_size)]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage inside: what libraries do in a child right after the fork may begin it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Rank(NamedTuple):
    process: BaseProcess
    receiver: Connection
    stack_file: IO[str]


class _Outcome(NamedTuple):
    time: float
    result: Any = None
    error: BaseException | None = None
    trace: str = ""


def _run_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    start: Connection,
    sender: Connection,
    stack_file: IO[str],
    timeout_s: float,
    init_group: bool,
) -> None:
    os.setpgid(0, 0)  # so that a kill takes the rank's loader workers too
    # Never collect the parent's garbage: a store of an earlier call may be among it, whose end
    # would wait for a thread that did not survive the fork.
    gc.freeze()
    gc.enable()
    # Says where the rank hangs, and ends it even if the test's process is gone.
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=stack_file)
    os.environ.update(environment | {"MASTER_PORT": str(start.recv())})
    torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
    try:
        if init_group:
            init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        result = _plain(fn(*args))
        if init_group:
            destroy_process_group()
        outcome = _Outcome(time.monotonic(), result)
        payload = bytes(ForkingPickler.dumps(outcome))
    except BaseException as error:
        trace = traceback.format_exc()
        outcome = _Outcome(time.monotonic(), error=_portable(error), trace=trace)
        payload = bytes(ForkingPickler.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(payload)  # the last deed: from here on the parent may end this process


def _plain(value: Any) -> Any:
    """Replace tensors by arrays: torch would send them as handles, which die with the rank."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _portable(error: BaseException) -> BaseException:
    """Return `error`, or its text if it cannot be sent and built again."""
    try:
        copy = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def _collect(ranks: list[_Rank], timeout_s: float) -> dict[int, _Outcome]:
    """Receive what ranks send until all are done, one failed (and the grace is over) or time is up.

    A rank that died without a word counts as failed; one that was not waited for is missing.
    """
    deadline = time.monotonic() + timeout_s + 1  # the ranks' own watchdogs come first
    outcomes: dict[int, _Outcome] = {}
    waiting = {rank.receiver: number for number, rank in enumerate(ranks)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(list(waiting), timeout=left):
            assert isinstance(receiver, Connection)
            number = waiting.pop(receiver)
            try:
                outcomes[number] = ForkingPickler.loads(receiver.recv_bytes())
            except EOFError:
                if _stack_of(ranks[number]):  # ended by its watchdog: that is a timeout
                    continue
                ranks[number].process.join()
                code = ranks[number].process.exitcode
                outcomes[number] = _Outcome(
                    time.monotonic(),
                    error=RuntimeError(f"rank {number} died with exit code {code}"),
                )
            if outcomes[number].error is not None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return outcomes


def _raise_failure(ranks: list[_Rank], outcomes: dict[int, _Outcome], timeout_s: float) -> None:
    failed = sorted((o.time, n) for n, o in outcomes.items() if o.error is not None)
    missing = [number for number in range(len(ranks)) if number not in outcomes]
    if failed:
        error = outcomes[failed[0][1]].error
        assert error is not None
        for _, number in failed:
            error.add_note(f"rank {number}: {outcomes[number].trace}")
        if missing:
            error.add_note(f"ranks {missing} were still running and were stopped")
        raise error
    if missing:
        stacks = "\n".join(f"rank {number}: {_stack_of(ranks[number])}" for number in missing)
        raise TimeoutError(f"ranks {missing} not done after {timeout_s} s\n{stacks}")


def _stack_of(rank: _Rank) -> str:
    rank.stack_file.seek(0)
    return rank.stack_file.read()


def _kill(process: BaseProcess) -> None:
    """End a rank and its children, whatever they are doing, and reap the rank."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has no group yet, or all of it is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
