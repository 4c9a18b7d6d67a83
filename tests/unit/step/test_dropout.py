"""The random state of a device that is not the current one; CPU ranks see a stand-in for CUDA."""

import pytest
import torch

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


@pytest.mark.gpu
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_dropout_is_replayed_on_a_gpu_that_is_not_the_current_one(keeps_graph):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(1000, device=OTHER, requires_grad=True)

    def forward(x):
        return torch.nn.functional.dropout(x, 0.5)

    torch.cuda.set_device(0)
    torch.manual_seed(0)
    state = RandomState.of(OTHER)
    with torch.set_grad_enabled(keeps_graph):
        kept = forward(x)
    masks = kept.detach().clone()
    if not keeps_graph:
        with state.replayed():
            kept = forward(x)
    kept.sum().backward()
    assert torch.equal(x.grad, masks)
