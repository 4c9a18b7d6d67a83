"""Phases of a step: named in a profiler's trace, and timed for who asks.

A phase covers what runs between its begin and its end; phases don't nest.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal["data", "embed", "gather", "loss", "replay", "sync", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "embed", "gather", "loss", "replay", "sync", "optimizer")
"""In the order of a step: waiting for the next batch; first forward passes; embeddings and hashes
of all ranks; loss and its gradient at the embeddings; pushing that into the weights, with the
second forward passes; averaging over ranks; clipping and moving the weights."""


class PhaseClock:
    """Seconds spent in each phase, on the device where it is a GPU.

    Args:
        device: Where the phases' work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def measure(self, name: Phase) -> Iterator[None]:
        """Add the time inside to a phase; on a GPU without waiting for it."""
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Of this device, which need not be the current one.
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._spans.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def read(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last call; waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._spans:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        seconds = self._seconds
        self._spans, self._seconds = [], dict.fromkeys(PHASES, 0.0)
        return seconds


_clock: PhaseClock | None = None


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Mark what runs inside as a phase of the step."""
    with torch.profiler.record_function(f"largebatch/{name}"):
        if _clock is None:
            yield
        else:
            with _clock.measure(name):
                yield


@contextmanager
def timed_phases(device: torch.device) -> Iterator[PhaseClock]:
    """Time the phases of the steps inside."""
    global _clock  # One step runs at a time in a process.
    assert _clock is None, "phases are timed already"
    _clock = PhaseClock(device)
    try:
        yield _clock
    finally:
        _clock = None
