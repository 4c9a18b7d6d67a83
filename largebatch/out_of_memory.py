"""Running out of memory: as an answer where less can be tried, as one line where it can't."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from largebatch.errors import UserError
from largebatch.transfer import wait_for


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes on a device; infinity: memory ran out."""
    try:
        wait_for(device)
        start = time.perf_counter()
        action()
        wait_for(device)
        return time.perf_counter() - start
    except torch.OutOfMemoryError:
        pass
    # Only out here does the error no longer hold what the action had in memory.
    free_cache(device)
    return math.inf


def free_cache(device: torch.device) -> None:
    """Give back the memory that torch holds in reserve on a GPU, in pieces of sizes gone by."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes on a GPU that this process could still fill."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Give a function that returns the most bytes held at once since the context began.

    Beyond those that were held then. 0 where the device is no GPU.
    """
    if device.type != "cuda":
        yield lambda: 0
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


@contextmanager
def ends_with(line: Callable[[], str]) -> Iterator[None]:
    """Make running out of memory inside a UserError, which says `line()`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(line()) from error
