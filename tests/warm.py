"""Start `python -m MODULE` without its imports: as a fork of this process, which has done them.

Importing torch and transformers takes a process some seconds, and a run of two ranks is three
processes. `WarmProcess` stands in for `subprocess.Popen` in tests of what a command says and
leaves. What hangs on a real start (an import, a variable that is read only then) needs a real one.
"""

import atexit
import faulthandler
import gc
import importlib
import logging
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from numerics.reference import tiny_encoder


class WarmProcess(subprocess.Popen[str]):
    """A process, forked from this one, that runs a module of ours as a new Python would.

    The launcher of ranks, when it runs in such a process, starts its ranks in the same way.
    """

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        module, *arguments = args[args.index("-m") + 1 :]
        _import_once()
        environment = dict(os.environ if env is None else env)

        def become() -> None:
            _become(module, arguments, environment)

        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; the new process uses none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            super().__init__(args, env=env, preexec_fn=become, **options)


@cache
def _import_once() -> None:
    """Import here what each process would after its fork."""
    for module in (
        "largebatch.cli.compose",
        "largebatch.evaluate.retrieval",
        "largebatch.parallel.fsdp",
        "largebatch.parallel.make",
        "largebatch.train.trainer",
        "torch._dynamo",
        "torch.distributed.launcher.api",
    ):
        importlib.import_module(module)
    tiny_encoder()


def _become(module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run `module` with nothing of the tests about, and end the process with its exit code."""
    code: Any = 1
    try:
        _forget_the_parent(environment)
        sys.argv = [module, *arguments]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        # What an interpreter does at its end.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_the_parent(environment: dict[str, str]) -> None:
    gc.freeze()  # what its garbage would close is not this process's
    # All but the standard streams, as in a new process. One of them is the pipe that tells Popen
    # that the process has started.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()
    multiprocessing.util._finalizer_registry.clear()
    multiprocessing.process._children.clear()
    atexit.register(multiprocessing.util._exit_function)
    faulthandler.disable()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for reference in logging._handlerList:
        if type(handler := reference()) is logging.StreamHandler:
            handler.stream = sys.stderr  # torch's write to what was the stream of the tests
    importlib.reload(warnings)  # pytest has put its own way to show them there
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = WarmProcess
