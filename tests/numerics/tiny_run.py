"""A run of six steps that takes less than a second, for tests of the whole loop."""

from pathlib import Path

import torch
from dist import run_ranks
from numerics.reference import tiny_encoder
from safetensors.torch import load_file

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
from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer

STEPS, STOP = 6, 3


def write_data(folder: Path) -> Path:
    """Write shards/ and dev/."""
    tiny_encoder()  # imports here, once, what each rank would import after its fork
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


def tiny_config(data: Path, output: Path, **changes) -> TrainConfig:
    """Return a config with everything that a resume could get wrong."""
    settings = {
        "output_dir": str(output),
        "global_batch": 15,
        "tokens_per_chunk": 60,
        "max_steps": STEPS,
        "backbone": BackboneConfig(
            vocab_size=300,
            config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.1,
            },
        ),
        "text": TextConfig(query_max_tokens=12, document_max_tokens=16),
        "temperature": TemperatureConfig(value=0.1, learned=True),
        "data": DataConfig(
            sources={"tiny": SourceConfig(urls=[str(data / "shards")])}, workers=1, lanes=4
        ),
        "schedule": ScheduleConfig(name="cosine", warmup_steps=2),
        "logger": LoggerConfig(wandb="disabled", plots=False),
        "eval": EvalConfig(dev={"dev": str(data / "dev")}, every_steps=2),
        "checkpoint": CheckpointConfig(every_steps=STOP, keep_last=3),
        "hardware": HardwareConfig(threads=1, device="cpu"),
    }
    return TrainConfig(**(settings | changes))


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, by file and name."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        f"{file}.{name}": tensor
        for file in ("weights", "optimizer", "random")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def same(left: dict, right: dict) -> bool:
    """Return whether two checkpoints are equal in every bit."""
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def train_on_ranks(run_config: TrainConfig, world_size: int) -> None:
    """Train on one or more ranks."""
    # Always in processes of their own: threads and loaders of a run leave this one alone.
    run_ranks(trainer.train, world_size, run_config, init_group=False)
