"""Importing DeepSpeed, and building what it compiles for CPU ranks.

On CPU DeepSpeed compiles a small C++ extension when it first connects ranks, which takes about a
minute. A process that is killed meanwhile leaves a lock in torch's cache of extensions, and every
later start waits for it without a word. So it is built by one process at a time under a lock that
dies with its holder, and in a cache of this Python environment's own.
"""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock

from largebatch.errors import UserError
from largebatch.world import World

CACHE_VARIABLE = "TORCH_EXTENSIONS_DIR"


def import_deepspeed(device: torch.device, world: World) -> Any:
    """Return the module `deepspeed`, connected to the ranks of the process group.

    Raises:
        UserError: Its extension can't be built.
    """
    prepare(device)
    # Where no launcher has set it, DeepSpeed would look for MPI.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    deepspeed = _quiet_import(device)
    # DeepSpeed calls collectives by the names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.comm.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


def prepare(device: torch.device) -> None:
    """Build DeepSpeed's extension for CPU ranks unless it is there; nothing to do on GPUs.

    Launchers call it once before they start ranks; ranks call it too, and wait for each other.

    Raises:
        UserError: There is no compiler, or it fails, or the cache can't be written.
    """
    if device.type != "cpu":
        return
    cache = Path(os.environ.setdefault(CACHE_VARIABLE, str(Path(sys.prefix) / "torch_extensions")))
    # ninja is installed beside this Python, which need not be on the path.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    deepspeed = _quiet_import(device)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    if not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(cache / "largebatch.lock"),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's of compilers that it doesn't know
            folder = cache / builder.name
            (folder / "lock").unlink(missing_ok=True)  # left by a build that was killed
            if not (folder / f"{builder.name}.so").is_file():
                _check_compiler()
            builder.load(verbose=False)
    except OSError as error:
        raise UserError(
            f"strategy=deepspeed on CPU keeps an extension in {cache}, which can't be written "
            f"({error}); set {CACHE_VARIABLE} to a folder that can"
        ) from error
    except (RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"strategy=deepspeed on CPU builds an extension in {cache}, which failed: {reason}; "
            "use strategy=ddp or strategy=fsdp, or install a working C++ compiler"
        ) from error


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"strategy=deepspeed on CPU builds an extension once, and the compiler {compiler!r} is "
            "not there; install g++, set CXX, or use strategy=ddp or strategy=fsdp"
        )


def _quiet_import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _without_stderr():
            warnings.simplefilter("ignore")
            import deepspeed
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence what compilers say that DeepSpeed tries its optional parts with."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
