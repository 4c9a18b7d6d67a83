"""A run that stopped and went on has the very weights of one that never stopped."""

import shutil
from pathlib import Path

import pytest
import torch
from dist import run_ranks
from safetensors.torch import load_file

import largebatch.train.step
from largebatch.config import (
    BackboneConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HardwareConfig,
    LoggerConfig,
    ScheduleConfig,
    SourceConfig,
    TemperatureConfig,
    TextConfig,
    TrainConfig,
)
from largebatch.data.records import Record
from largebatch.data.shards import ShardWriter
from largebatch.data.stream import Stream
from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set
from largebatch.train import trainer

STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "shards", records_per_shard=40) as writer:
        for n in range(90):
            text = f"{'number ' * (n % 5)}{n} and {n * n % 97}"
            writer.write(Record(f"query {text}", f"document of {text}", [], "tiny", f"r{n}"))
    names = [str(n) for n in range(12)]
    save_retrieval_set(
        RetrievalSet(
            "dev",
            {n: f"document of {n}" for n in names},
            {f"q{n}": f"query {n}" for n in names},
            {f"q{n}": {n: 1} for n in names},
        ),
        folder / "dev",
    )
    return folder


def config(data: Path, output: Path, **changes) -> TrainConfig:
    return TrainConfig(
        output_dir=str(output),
        global_batch=15,
        tokens_per_chunk=60,
        max_steps=STEPS,
        backbone=BackboneConfig(
            vocab_size=300,
            config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.1,
            },
        ),
        text=TextConfig(query_max_tokens=12, document_max_tokens=16),
        temperature=TemperatureConfig(value=0.1, learned=True),
        data=DataConfig(
            sources={"tiny": SourceConfig(urls=[str(data / "shards")])}, workers=1, lanes=4
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2),
        logger=LoggerConfig(wandb="disabled", plots=False),
        eval=EvalConfig(dev={"dev": str(data / "dev")}, every_steps=2),
        checkpoint=CheckpointConfig(every_steps=STOP, keep_last=3),
        hardware=HardwareConfig(threads=1, device="cpu"),
        **changes,
    )


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        f"{file}.{name}": tensor
        for file in ("weights", "optimizer", "random")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def same(left: dict, right: dict) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def train_on_ranks(run_config: TrainConfig, world_size: int) -> None:
    # Always in processes of their own: threads and loaders of a run leave this one alone.
    run_ranks(trainer.train, world_size, run_config, init_group=False)


def stopped_copy(whole: Path, copy: Path) -> Path:
    """Return a copy of a run as it was when it had taken STOP steps."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    for step in (2, 4):  # kept as the best, after or before the stop
        shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    for name in ("evaluation.json", "checkpoints/best.json"):
        (copy / name).unlink(missing_ok=True)
    return copy


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return uninterrupted runs by world size."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp(f"whole{world_size}") / "run"
        train_on_ranks(config(data, runs[world_size]), world_size)
    return runs


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_is_bit_identical(data, whole, tmp_path, world_size):
    copy = stopped_copy(whole[world_size], tmp_path / "run")
    train_on_ranks(config(data, copy), world_size)
    assert same(tensors(copy), tensors(whole[world_size]))
    assert not same(tensors(copy), tensors(copy, STOP) | {})


def test_another_world_size_goes_on(data, whole, tmp_path):
    copy = stopped_copy(whole[1], tmp_path / "run")
    train_on_ranks(config(data, copy), 2)
    assert (copy / "model" / "model.safetensors").is_file()


def lose_random_state():
    trainer.load_random_state = lambda *args, **kwargs: None


def lose_optimizer():
    trainer.load_optimizer = lambda *args, **kwargs: None


def lose_temperature():
    plain = trainer.load_weights

    def load(folder, step, state):
        before = state.loss.temperature.log_scale.detach().clone()
        plain(folder, step, state)
        state.loss.temperature.log_scale.data.copy_(before)

    trainer.load_weights = load


def lose_schedule():
    plain = largebatch.train.step.learning_rate
    largebatch.train.step.learning_rate = lambda step, *args, **kwargs: plain(
        step - STOP, *args, **kwargs
    )


def lose_stream_position():
    plain = Stream.batches
    Stream.batches = lambda self, first, stop: plain(self, 0, stop - first)


@pytest.mark.parametrize(
    "lose",
    [lose_random_state, lose_optimizer, lose_temperature, lose_schedule, lose_stream_position],
)
def test_a_broken_restore_is_seen(data, whole, tmp_path, lose):
    copy = stopped_copy(whole[1], tmp_path / "run")

    def broken(run_config):
        lose()
        trainer.train(run_config)

    run_ranks(broken, 1, config(data, copy), init_group=False)
    found, expected = tensors(copy), tensors(whole[1])
    weights = {name for name in found if name.startswith("weights.")}
    assert not same({n: found[n] for n in weights}, {n: expected[n] for n in weights})
