"""Checkpoints: whole or not at all, bit-identical, and only into the same model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from largebatch.config import OptimConfig
from largebatch.errors import UserError
from largebatch.losses.temperature import Temperature
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.train import checkpoint
from largebatch.train.checkpoint import (
    Best,
    Tensors,
    checkpoint_path,
    list_checkpoints,
    load_best,
    load_encoder_weights,
    load_optimizer,
    load_random_state,
    load_weights,
    read_details,
    read_random_state,
    remove_old,
    save_checkpoint,
)
from largebatch.world import World

CPU = torch.device("cpu")


class Tied(torch.nn.Module):
    """Has what is awkward to save: shared, transposed and integer tensors, and a scalar."""

    def __init__(self, width=4):
        super().__init__()
        self.embed = torch.nn.Embedding(6, width)
        self.out = torch.nn.Linear(width, 6)
        self.out.weight = self.embed.weight
        self.turned = torch.nn.Parameter(torch.randn(3, width).T)
        self.unused = torch.nn.Parameter(torch.randn(2))
        self.register_buffer("count", torch.tensor(7))


def make_strategy(encoder, loss):
    return ReplicatedModel({"encoder": encoder, "objective": loss}, OptimConfig(), Collectives())


def take_step(strategy):
    encoder = strategy.encoder
    value = encoder.out(encoder.embed.weight).sum() + (encoder.turned**2).sum()
    (value * strategy.modules["objective"].temperature()).backward()
    with strategy.gradient_pass():  # gives `unused` its gradient
        pass
    strategy.step(2e-4)
    strategy.zero_grad()


def make_state(seed, *, width=4, steps=0):
    """Return a strategy whose model has taken some steps."""
    torch.manual_seed(seed)
    state = make_strategy(Tied(width), ContrastiveLoss(Temperature(0.1, learned=True)))
    for _ in range(steps):
        take_step(state)
    return state


def save(folder, step, state, *, best=None, **details):
    save_checkpoint(
        folder,
        step,
        Tensors.of(state),
        random_states=[read_random_state(CPU)],
        best=best,
        details={"config": {}, **details},
    )


def tensors(state):
    """Return every tensor of a state by name."""
    found = state.weights() | {
        f"optimizer.{name}": tensor for name, tensor in state.optimizer_state().items()
    }
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_round_trip_is_bit_identical(tmp_path):
    state = make_state(0, steps=3)
    save(tmp_path, 3, state, elapsed_s=1.5)
    other = make_state(1, steps=1)
    load_weights(tmp_path, 3, other)
    load_optimizer(tmp_path, 3, other)
    assert_equal(tensors(other), tensors(state))
    assert sum(name.startswith("optimizer") for name in tensors(state)) == 15  # 5 are trained
    details = read_details(tmp_path, 3)
    assert (details["step"], details["world_size"], details["elapsed_s"]) == (3, 1, 1.5)


def test_optimizer_goes_on_as_if_never_stopped(tmp_path):
    save(tmp_path, 3, make_state(0, steps=3))
    resumed = make_state(1)
    load_weights(tmp_path, 3, resumed)
    load_optimizer(tmp_path, 3, resumed)
    straight = make_state(0, steps=4)
    take_step(resumed)
    assert_equal(tensors(resumed), tensors(straight))


def test_encoder_alone(tmp_path):
    state, encoder = make_state(0), Tied()
    save(tmp_path, 1, state)
    load_encoder_weights(tmp_path, 1, encoder)
    assert_equal(encoder.state_dict(), state.encoder.state_dict())


def test_names_do_not_depend_on_order_and_nothing_is_a_pickle(tmp_path):
    save(tmp_path, 1, make_state(0, steps=1))
    folder = checkpoint_path(tmp_path, 1)
    assert {path.name for path in folder.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
    }
    assert "exp_avg.objective.temperature.log_scale" in load_file(folder / "optimizer.safetensors")
    assert "encoder.out.bias" in load_file(folder / "weights.safetensors")


def test_random_state_of_each_rank(tmp_path):
    states, expected = [], []
    for rank in range(2):
        torch.manual_seed(rank)
        states.append(read_random_state(CPU))
        expected.append(torch.rand(3))
    save_checkpoint(
        tmp_path,
        1,
        Tensors.of(make_state(0)),
        random_states=states,
        best=None,
        details={"config": {}},
    )
    for rank in (1, 0):
        load_random_state(tmp_path, 1, world=World(rank, 2), device=CPU)
        assert torch.equal(torch.rand(3), expected[rank])
    for rank in range(3):  # all of them say so
        with pytest.raises(UserError, match=r"random\.safetensors is damaged: cpu\.2 is missing"):
            load_random_state(tmp_path, 1, world=World(rank, 3), device=CPU)


def test_half_written_one_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1, make_state(0))
    partial = tmp_path / ".step_00000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    (tmp_path / "step_00000003").mkdir()  # no state.json: not a checkpoint
    assert list_checkpoints(tmp_path) == [1]
    remove_old(tmp_path, keep_last=1, best=None)
    assert not partial.exists()
    assert list_checkpoints(tmp_path) == [1]


@pytest.mark.parametrize("number", range(5))
def test_a_full_disk_leaves_the_earlier_one(tmp_path, monkeypatch, number):
    """Whatever write fails: the error is told, the earlier checkpoint stays, nothing is left."""
    state = make_state(0, steps=1)
    save(tmp_path, 1, state)
    calls = []

    def failing(function, name):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == number + 1:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, "save"))
    monkeypatch.setattr(checkpoint, "_flush", failing(checkpoint._flush, "flush"))
    monkeypatch.setattr(Path, "replace", failing(Path.replace, "rename"))
    with pytest.raises(UserError, match=r"step_00000002 can't be written: no space left .*; free"):
        save(tmp_path, 2, make_state(1, steps=2))
    assert list_checkpoints(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    other = make_state(2)
    load_weights(tmp_path, 1, other)
    load_optimizer(tmp_path, 1, other)
    assert_equal(tensors(other), tensors(state))
    assert calls == ["save", "save", "save", "flush", "rename"][: number + 1]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("victim", ["save_file", "_flush"])
def test_a_kill_leaves_the_earlier_one(tmp_path, monkeypatch, victim):
    save(tmp_path, 1, make_state(0))

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, victim, killed)
        with pytest.raises(Killed):
            save(tmp_path, 2, make_state(1))
    assert list_checkpoints(tmp_path) == [1]
    load_weights(tmp_path, 1, make_state(2))
    save(tmp_path, 2, make_state(1))  # what is left over is in nobody's way
    assert list_checkpoints(tmp_path) == [1, 2]


def test_retention(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, make_state(0), best=Best(20, 0.5) if step >= 20 else None)
        remove_old(tmp_path, keep_last=2, best=load_best(tmp_path))
    assert list_checkpoints(tmp_path) == [20, 30, 40]
    assert load_best(tmp_path) == Best(20, 0.5)
    remove_old(tmp_path, keep_last=1, best=None)
    assert list_checkpoints(tmp_path) == [40]
    assert load_best(tmp_path) is None  # noted, but gone


def test_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    assert load_best(tmp_path / "missing") is None


def test_another_model(tmp_path):
    save(tmp_path, 1, make_state(0, steps=1))
    wider = make_state(0, width=5)
    with pytest.raises(
        UserError, match=r"is of another model or damaged: .*size mismatch"
    ) as caught:
        load_weights(tmp_path, 1, wider)
    assert "\n" not in str(caught.value)
    smaller = make_strategy(torch.nn.Linear(2, 2), ContrastiveLoss())
    with pytest.raises(UserError, match=r"is missing; .* is unknown; .* and \d more"):
        load_weights(tmp_path, 1, smaller)
    for state in (wider, smaller):
        with pytest.raises(UserError, match="is of another model or damaged"):
            load_optimizer(tmp_path, 1, state)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("weights.safetensors", load_weights),
        ("optimizer.safetensors", load_optimizer),
        ("state.json", lambda folder, step, _: read_details(folder, step)),
        (
            "random.safetensors",
            lambda folder, step, _: load_random_state(folder, step, world=World(), device=CPU),
        ),
    ],
)
def test_damaged_files(tmp_path, file, load):
    state = make_state(0, steps=1)
    save(tmp_path, 1, state)
    path = checkpoint_path(tmp_path, 1) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="can't be read"):
        load(tmp_path, 1, state)
    path.unlink()
    with pytest.raises(UserError, match="can't be read"):
        load(tmp_path, 1, state)


def test_another_format(tmp_path):
    save(tmp_path, 1, make_state(0))
    path = checkpoint_path(tmp_path, 1) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        read_details(tmp_path, 1)


# What a checkpoint may lack, have too much of, or have wrongly: file, tensor, its other value.
WEIGHT, MOMENT = "encoder.embed.weight", "exp_avg.encoder.embed.weight"
STEP, TEMPERATURE = "step.encoder.embed.weight", "objective.temperature.log_scale"
FAULTS = {
    "first moment missing": ("optimizer", MOMENT, None, f"{MOMENT} is missing"),
    "second moment missing": (
        "optimizer",
        "exp_avg_sq.objective.temperature.log_scale",
        None,
        "exp_avg_sq.objective.temperature.log_scale is missing",
    ),
    "step count missing": ("optimizer", STEP, None, f"{STEP} is missing"),
    "moment too many": ("optimizer", "exp_avg.encoder.gone", torch.zeros(2), "gone is unknown"),
    "moment of a buffer": ("optimizer", "exp_avg.encoder.count", torch.zeros(()), "is unknown"),
    "moment of another kind": ("optimizer", "max_exp_avg_sq.x", torch.zeros(()), "is unknown"),
    "moment of another shape": ("optimizer", MOMENT, torch.zeros(24), r"\[24\], not \[6, 4\]"),
    "moment in half precision": (
        "optimizer",
        MOMENT,
        torch.zeros(6, 4, dtype=torch.float16),
        f"{MOMENT} is of type float16, not float32",
    ),
    "step count of whole numbers": ("optimizer", STEP, torch.tensor(2), "is of type int64"),
    "step count of another step": ("optimizer", STEP, torch.tensor(7.0), f"{STEP} is 7, not 2"),
    "weight missing": ("weights", WEIGHT, None, f"{WEIGHT} is missing"),
    "weight too many": ("weights", "encoder.gone", torch.zeros(2), "encoder.gone is unknown"),
    "weight of bytes": (
        "weights",
        WEIGHT,
        torch.zeros(6, 4, dtype=torch.int8),
        f"{WEIGHT} is of type int8, not float32",
    ),
    "temperature missing": ("weights", TEMPERATURE, None, f"{TEMPERATURE} is missing"),
    "generator of another size": ("random", "cpu.0", torch.zeros(3), "cpu.0 is no state of a gene"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_file_and_tensor_and_nothing_is_loaded(tmp_path, fault):
    file, name, value, told = FAULTS[fault]
    save(tmp_path, 2, make_state(0, steps=2))
    path = checkpoint_path(tmp_path, 2) / f"{file}.safetensors"
    saved = load_file(path)
    saved.pop(name, None)
    save_file(saved | ({} if value is None else {name: value}), path)
    other = make_state(1, steps=1)
    before, generator = tensors(other), torch.get_rng_state()
    with pytest.raises(
        UserError, match=rf"{file}\.safetensors .*{told}.*; put a whole copy back"
    ) as e:
        {
            "weights": lambda: load_weights(tmp_path, 2, other),
            "optimizer": lambda: load_optimizer(tmp_path, 2, other),
            "random": lambda: load_random_state(tmp_path, 2, world=World(), device=CPU),
        }[file]()
    assert "\n" not in str(e.value)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_equal(tensors(other), before)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "holds no JSON object"),
        ('{"format": 3}', "step is missing or wrong"),
        ('{"format": 3, "step": 1, "world_size": 1, "config": {}}', "best is missing or wrong"),
        (
            '{"format": 3, "step": 4, "world_size": 1, "config": {}, "best": null}',
            "is of step 4, not of 1 as its folder says",
        ),
        (
            '{"format": 3, "step": 1, "world_size": 1, "config": {}, "best": {"at": 1}}',
            "best is wrong",
        ),
    ],
)
def test_a_state_that_lacks_something_is_told(tmp_path, content, told):
    save(tmp_path, 1, make_state(0))
    (checkpoint_path(tmp_path, 1) / "state.json").write_text(content)
    with pytest.raises(UserError, match=rf"state\.json .*{told}"):
        load_best(tmp_path)


def test_a_copy_of_a_checkpoint_beside_it_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, make_state(0))
    for name in ("step_00000001_backup", "step_latest", "step_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert list_checkpoints(tmp_path) == [1]
