"""A run that stopped and went on has the very weights of one that never stopped."""

import shutil
from pathlib import Path

import pytest
from dist import run_ranks
from numerics.tiny_run import STEPS, STOP, same, tensors, tiny_config, train_on_ranks, write_data

import largebatch.train.step
from largebatch.data.stream import Stream
from largebatch.train import trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def stopped_copy(whole: Path, copy: Path) -> Path:
    """Return a copy of a run as it was when it had taken STOP steps."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    for step in (2, 4):  # kept as the best, after or before the stop
        shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    (copy / "evaluation.json").unlink()
    return copy


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return uninterrupted runs by world size."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp(f"whole{world_size}") / "run"
        train_on_ranks(tiny_config(data, runs[world_size]), world_size)
    return runs


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_is_bit_identical(data, whole, tmp_path, world_size):
    copy = stopped_copy(whole[world_size], tmp_path / "run")
    train_on_ranks(tiny_config(data, copy), world_size)
    assert same(tensors(copy), tensors(whole[world_size]))
    assert not same(tensors(copy), tensors(copy, STOP))


def train_and_note_ids(run_config):
    """Train; return the ids of this rank's part of each batch."""
    ids = []
    plain = Stream.batches

    def batches(self, first, stop):
        for batch in plain(self, first, stop):
            ids.append((batch.step, batch.ids))
            yield batch

    Stream.batches = batches
    trainer.train(run_config)
    return ids


def noted_ids(run_config, world_size):
    """Return the ids of each global batch, by step."""
    ranks = run_ranks(train_and_note_ids, world_size, run_config, init_group=False)
    steps = [[step for step, _ in ids] for ids in ranks]
    assert all(other == steps[0] for other in steps)
    return {
        step: [record for ids in ranks for record in ids[number][1]]
        for number, step in enumerate(steps[0])
    }


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_world_size_goes_on_with_the_same_batches(data, whole, tmp_path, before, after):
    expected = noted_ids(tiny_config(data, tmp_path / "straight"), 1)
    assert list(expected) == list(range(STEPS))
    copy = stopped_copy(whole[before], tmp_path / "run")
    found = noted_ids(tiny_config(data, copy), after)
    assert found == {step: expected[step] for step in range(STOP, STEPS)}
    assert len(set(found[STOP])) == len(found[STOP]) == 15
    assert (copy / "model" / "model.safetensors").is_file()


def lose_random_state():
    trainer.load_random_state = lambda *args, **kwargs: None


def lose_optimizer():
    trainer.load_optimizer = lambda *args, **kwargs: None


def lose_temperature():
    plain = trainer.load_weights

    def load(folder, step, state):
        temperature = state.modules["objective"].temperature
        before = temperature.log_scale.detach().clone()
        plain(folder, step, state)
        temperature.log_scale.data.copy_(before)

    trainer.load_weights = load


def lose_schedule():
    plain = largebatch.train.step.learning_rate
    largebatch.train.step.learning_rate = lambda step, *args, **kwargs: plain(
        step - STOP, *args, **kwargs
    )


def lose_stream_position():
    """Begin again with the first batch; nothing else changes, the learning rate above all."""
    plain = Stream.batches

    def batches(self, first, stop):
        for step, batch in enumerate(plain(self, 0, stop - first), first):
            yield batch._replace(step=step)

    Stream.batches = batches


@pytest.mark.parametrize(
    "lose",
    [lose_random_state, lose_optimizer, lose_temperature, lose_schedule, lose_stream_position],
)
def test_a_broken_restore_is_seen(data, whole, tmp_path, lose):
    copy = stopped_copy(whole[1], tmp_path / "run")

    def broken(run_config):
        lose()
        trainer.train(run_config)

    run_ranks(broken, 1, tiny_config(data, copy), init_group=False)
    found, expected = tensors(copy), tensors(whole[1])
    weights = {name for name in found if name.startswith("weights.")}
    assert not same({n: found[n] for n in weights}, {n: expected[n] for n in weights})
