"""The clock of phases; CPU ranks see a stand-in for CUDA."""

from types import SimpleNamespace

import torch

from largebatch.phases import PhaseClock

OTHER = torch.device("cuda", 1)


def test_phases_are_timed_on_their_own_device(monkeypatch):
    recorded = []
    event = SimpleNamespace(record=lambda stream="of the current device": recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda *, enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with PhaseClock(OTHER).measure("embed"):
        pass
    assert recorded == ["stream of cuda:1"] * 2
