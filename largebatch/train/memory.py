"""Peak memory of this process, on its GPU or in main memory."""

import os
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def bound_kernel_cache() -> None:
    """Keep few of oneDNN's compiled CPU kernels; to be called before the first of them is made.

    It compiles one per shape and keeps 1,024, and chunks have many shapes: without a bound memory
    grows with the number of chunks, that is with the global batch, by hundreds of megabytes. A
    value in the environment stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has held at once so far, in GiB.

    On CUDA: what torch allocated for tensors on `device`. Elsewhere: the resident set, that is
    everything in main memory, the interpreter and the libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if _STATUS.exists():
        # Not getrusage: on Linux its maximum is inherited from the process that started this one.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def forget_peak(device: torch.device) -> float:
    """Make the peak start anew at what is held now, and return that in GiB.

    Where that is not possible (main memory, but not on Linux) it goes on from the process's start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5", encoding="ascii")
    return peak_memory_gib(device)
