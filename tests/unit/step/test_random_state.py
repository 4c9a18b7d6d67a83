"""The random state of a device that is not the current one; CPU ranks see a stand-in for CUDA."""

from types import SimpleNamespace

import pytest
import torch
from largebatch.step.keep import embed_keeping

from largebatch import out_of_memory
from largebatch.phases import PhaseClock
from largebatch.step.dropout import RandomState

OTHER = torch.device("cuda", 1)


class Generators:
    """Stands in for the generators of two GPUs, of which number 0 is the current one."""

    def __init__(self):
        self.states = [torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)]

    def get_rng_state(self, device="cuda"):
        return self.states[torch.device(device).index or 0].clone()

    def set_rng_state(self, state, device="cuda"):
        self.states[torch.device(device).index or 0] = state.clone()

    def draw(self, index):
        self.states[index] = self.states[index] + 1


@pytest.fixture
def gpus(monkeypatch):
    generators = Generators()
    monkeypatch.setattr(torch.cuda, "get_rng_state", generators.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", generators.set_rng_state)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return generators


def test_a_state_is_restored_where_it_was_read(gpus):
    before = RandomState.of(OTHER)
    gpus.draw(0)
    gpus.draw(1)
    before.restore()
    assert [int(state) for state in gpus.states] == [1, 0]


def test_a_replay_leaves_both_generators_as_they_were(gpus):
    before = RandomState.of(OTHER)
    gpus.draw(0)
    gpus.draw(1)
    cpu = torch.get_rng_state()

    def fails():
        with before.replayed():
            assert [int(state) for state in gpus.states] == [1, 0]
            gpus.draw(1)
            gpus.draw(1)
            torch.rand(3)
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        fails()
    assert [int(state) for state in gpus.states] == [1, 1]
    assert torch.equal(torch.get_rng_state(), cpu)


def test_phases_are_timed_on_their_own_device(monkeypatch):
    recorded = []
    event = SimpleNamespace(record=lambda stream="of the current device": recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda *, enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with PhaseClock(OTHER).measure("embed"):
        pass
    assert recorded == ["stream of cuda:1"] * 2


def test_memory_is_that_of_the_device(monkeypatch):
    numbers = {"memory_reserved": 300, "memory_allocated": 100, "max_memory_allocated": 170}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, n=number: n * (device == OTHER))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * (device == OTHER), 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: device.index)
    assert out_of_memory.free_bytes(OTHER) == 1200
    with out_of_memory.peak_bytes(OTHER) as peak:
        assert peak() == 70


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["none", "layers", "all"])
def test_dropout_is_replayed_on_a_gpu_that_is_not_the_current_one(level):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(1000, device=OTHER, requires_grad=True)

    def forward(x):
        return torch.nn.functional.dropout(x, 0.5)

    torch.cuda.set_device(0)
    torch.manual_seed(0)
    state = RandomState.of(OTHER)
    kept = embed_keeping(forward, x, level)
    masks = kept.detach().clone()
    if level == "none":
        with state.replayed():
            kept = forward(x)
    kept.sum().backward()
    assert torch.equal(x.grad, masks)
