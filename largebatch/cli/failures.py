"""How a failure reaches the user: one line, from one process, and exit code 1.

A process that runs alone prints its own line. A rank that `largebatch train` started hands its
failure to the starting process through the file that the elastic launcher names in
TORCHELASTIC_ERROR_FILE; that process prints the first failure only. Under a torchrun of the user's
own, each rank writes that file for torchrun's report, and prints its line; where every rank would
print the same one, rank 0 does.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from largebatch.errors import UserError
from largebatch.files import full_disk

LAUNCHED = "LARGEBATCH_LAUNCHED"
"""Environment variable that tells a rank that `largebatch` itself started it."""
EXIT_WITHIN_S = 5
RANK_0_SPEAKS_WITHIN_S = 30

# What gloo, the TCP store and NCCL say on a rank that waits for one that is gone.
_LOST_CONNECTION = re.compile(
    "connection (closed|reset) by peer|broken pipe|remote process exited", re.IGNORECASE
)


class RanksFailed(Exception):  # noqa: N818 (it states a fact, and never leaves commands/)
    """The ranks that this process started have ended, and not well."""

    def __init__(self, line: str, trace: str = "") -> None:
        super().__init__(line)
        self.trace = trace
        """The traceback of the rank that failed first; empty where there is none."""


class Failure(NamedTuple):
    """What a rank wrote about its end."""

    line: str
    trace: str
    is_user_error: bool
    time_s: float


def is_rank() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def describe(error: BaseException) -> str:
    """Tell an exception in one line."""
    message = " ".join(str(error).split())
    if isinstance(error, UserError | RanksFailed):
        return message
    if _lost_connection(error):
        return "the connection to another rank was lost; what that one says is the cause"
    if (told := full_disk(error)) is not None:
        name = getattr(error, "filename", None)
        return f"{name or 'a file'} can't be read or written: {told}"
    kind = type(error).__name__
    return f"{kind}: {message or 'no message'} (run again with debug=true for the traceback)"


def report(error: Exception, *, debug: bool) -> None:
    """Print or hand on a failure, as the process's role wants it; the caller exits with 1."""
    if is_rank():
        _write_error_file(error)
        if LAUNCHED not in os.environ and _all_ranks_say_so(error):
            # The launcher ends all ranks when the first one ends, and rank 0 may not have spoken
            # yet. So this one waits to be ended; if it never is, rank 0 had nothing to say.
            time.sleep(RANK_0_SPEAKS_WITHIN_S)
        # A rank whose peers still wait for it must not hang while the interpreter shuts down.
        silent = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(EXIT_WITHIN_S, exit=True, file=silent)
        if LAUNCHED in os.environ:
            return
    if debug:
        sys.stderr.write(error.trace if isinstance(error, RanksFailed) else _trace(error))
    print(f"error: {describe(error)}", file=sys.stderr)


def end_failed_rank(code: int) -> NoReturn:
    """End this process at once, its loader processes first.

    An ordinary end takes down the connections to other ranks, which waits for those that are gone,
    or aborts with words of its own.
    """
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who read it may be gone
            stream.flush()
    os._exit(code)


def read_error_file(file: str) -> Failure | None:
    """Return what a rank wrote, or None where it ended without a word."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        return Failure(**content["message"]["extraInfo"]["largebatch"])
    except (OSError, ValueError, KeyError):
        return None


def _write_error_file(error: Exception) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    is_user_error = isinstance(error, UserError)
    line, lost = describe(error), _lost_connection(error)
    # The layout is torch.distributed.elastic's (whole seconds, as text); ours is one entry in it.
    # torchrun calls the earliest failure the cause, which one that follows from another never is.
    extra = {
        "py_callstack": line if is_user_error or lost else _trace(error),
        "timestamp": str(int(time.time()) + lost),
        "largebatch": Failure(line, _trace(error), is_user_error, time.time())._asdict(),
    }
    text = json.dumps({"message": {"message": line, "extraInfo": extra}})
    Path(file).write_text(text, encoding="utf-8")


def _all_ranks_say_so(error: Exception) -> bool:
    """Whether rank 0 hits this mistake too: one in the config, found before ranks are connected."""
    distributed = sys.modules.get("torch.distributed")
    connected = distributed is not None and distributed.is_initialized()
    return isinstance(error, UserError) and not connected and os.environ["RANK"] != "0"


def _lost_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
