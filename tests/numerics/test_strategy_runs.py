"""Whole runs under every strategy: the losses, scores and export of ddp's, and any resumes any."""

import json
import shutil

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.tiny_run import STEPS, STOP, tensors, tiny_config, write_data
from safetensors.torch import load_file

from largebatch.config import BackboneConfig, StrategyConfig
from largebatch.parallel.deepspeed_build import prepare
from largebatch.train import trainer

pytestmark = pytest.mark.slow

STRATEGIES = {
    "fsdp": StrategyConfig(name="fsdp"),
    "zero2": StrategyConfig(name="deepspeed", zero_stage=2),
    "zero3": StrategyConfig(
        name="deepspeed",
        zero_stage=3,
        config={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prepare(torch.device("cpu"))
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(data, output, strategy):
    # Without dropout: chunks that a strategy adds to make counts equal draw random numbers too.
    backbone = BackboneConfig(
        vocab_size=300,
        config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    )
    return tiny_config(data, output, strategy=strategy, backbone=backbone)


def train(config, world_size):
    run_ranks(trainer.train, world_size, config, init_group=False, timeout_s=120)


def entries(folder):
    """Return losses, norms and scores of a run, by step and name."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = ("train/loss", "train/grad_norm", "train/param_norm", "train/temperature", "eval/")
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name.startswith(kept)
    }


def assert_same(folder, other):
    found, expected = entries(folder), entries(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-3, abs=1e-4), key
    for name, tensor in tensors(other).items():
        if not name.startswith("random"):
            torch.testing.assert_close(tensors(folder)[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(config_of(data, folder, StrategyConfig()), 2)
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_is_that_of_ddp(data, plain, tmp_path, name):
    train(config_of(data, tmp_path / "run", STRATEGIES[name]), 2)
    assert_same(tmp_path / "run", plain)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for tensor_name, tensor in load_file(plain / "model" / "model.safetensors").items():
        np.testing.assert_allclose(exported[tensor_name], tensor, atol=1e-4)


@pytest.mark.parametrize(("name", "ranks"), [("fsdp", 1), ("zero3", 2), ("zero2", 1)])
def test_a_run_of_ddp_goes_on_under_another_strategy(data, plain, tmp_path, name, ranks):
    folder = shutil.copytree(plain, tmp_path / "run")
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > STOP:
            shutil.rmtree(path)
    (folder / "evaluation.json").unlink()
    train(config_of(data, folder, STRATEGIES[name]), ranks)
    assert (folder / "checkpoints" / f"step_{STEPS:08d}").is_dir()
    assert_same(folder, plain)
