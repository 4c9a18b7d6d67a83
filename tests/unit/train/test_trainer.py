"""The loop: what is kept and exported, what is refused, and runs that are over."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from dist import run_ranks
from numerics.tiny_run import STEPS, STOP, tiny_config, train_on_ranks, write_data
from safetensors.torch import load_file, save_file

from largebatch.commands import export
from largebatch.config import (
    BackboneConfig,
    CheckpointConfig,
    EvalConfig,
    ExportConfig,
    LoggerConfig,
    OptimConfig,
    PoolingConfig,
    TextConfig,
)
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.train import result, trainer
from largebatch.train.checkpoint import checkpoint_path, list_checkpoints, load_best


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return a finished run, never to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_on_ranks(tiny_config(data, folder), 1)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "config.yaml")
    }


def no_step(*args, **kwargs):
    raise AssertionError("a step was taken")


def train_without_steps(config):
    trainer.train_step = no_step
    trainer.train(config)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_finished_run_trains_nothing_and_stays_as_it_is(data, copy, world_size):
    before = files(copy)
    run_ranks(train_without_steps, world_size, tiny_config(data, copy), init_group=False)
    assert files(copy) == before


def test_a_checkpoint_that_a_kill_left_aside_is_brought_back(data, copy):
    before = files(copy)
    last = checkpoint_path(copy / "checkpoints", STEPS)
    last.rename(last.with_name(f".{last.name}.old"))
    run_ranks(train_without_steps, 1, tiny_config(data, copy), init_group=False)
    assert files(copy) == before


def test_a_finished_run_whose_result_was_lost_is_only_scored_and_exported(data, whole, copy):
    shutil.rmtree(copy / "model")
    run_ranks(train_without_steps, 1, tiny_config(data, copy), init_group=False)
    assert files(copy / "model") == files(whole / "model")


def test_what_a_run_leaves_behind(whole):
    found = entries(whole)
    assert [e["step"] for e in found if "train/loss" in e] == list(range(1, STEPS + 1))
    scores = {e["step"]: e["eval/dev/ndcg@10"] for e in found if "eval/dev/ndcg@10" in e}
    assert sorted(scores) == [0, 2, 4, 6]
    best = load_best(whole / "checkpoints")
    highest = max(score for step, score in scores.items() if step)
    assert best.score == highest
    assert best.step == min(step for step, score in scores.items() if score == highest and step)
    # The export is the best checkpoint's.
    weights = load_file(checkpoint_path(whole / "checkpoints", best.step) / "weights.safetensors")
    exported = Encoder.from_pretrained(whole / "model").state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, weights[f"encoder.{name}"])
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["step"] == best.step
    assert found["trained"]["eval/dev/ndcg@10"] == pytest.approx(best.score)
    assert found["before"]["eval/dev/ndcg@10"] == pytest.approx(scores[0])


@pytest.mark.parametrize("keep_best", [True, False])
def test_keeps_the_last_and_the_best(data, tmp_path, monkeypatch, keep_best):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.2])
    monkeypatch.setattr(
        trainer.Evaluation, "score", lambda self, retrieval_set: {"ndcg@10": next(scores)}
    )
    monkeypatch.setattr(result, "print_result", lambda *args: None)
    config = tiny_config(
        data,
        tmp_path,
        eval=EvalConfig(dev={"dev": str(data / "dev")}, every_steps=1, before=False),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=1, keep_best=keep_best),
    )
    train_on_ranks(config, 1)
    assert list_checkpoints(tmp_path / "checkpoints") == ([2, 6] if keep_best else [6])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["step"] == (2 if keep_best else 6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_config_is_refused_with_the_difference(data, copy, world_size):
    before = files(copy)
    config = tiny_config(data, copy, optim=OptimConfig(lr=0.1), max_steps=9)
    with pytest.raises(UserError, match=r"another config \(optim\.lr: 0\.0002 -> 0\.1\); set"):
        train_on_ranks(config, world_size)
    assert files(copy) == before


def test_a_run_from_a_checkpoint_is_as_the_checkpoint_says_unless_told(data, whole, tmp_path):
    checkpoint = shutil.copytree(whole / "model", tmp_path / "checkpoint")
    (checkpoint / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    modules = json.loads((checkpoint / "modules.json").read_text())
    (checkpoint / "modules.json").write_text(json.dumps(modules[:2]))
    (checkpoint / "largebatch.json").unlink()

    def settings(folder):
        encoder = Encoder.from_pretrained(folder / "model")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        pooling = {"mode": encoder.pooling.name, "normalize": encoder.normalize}
        pooling |= encoder.pooling_options
        assert {name: config["pooling"][name] for name in pooling} == pooling
        assert config["text"].pop("task") is None
        for name, value in config["text"].items():
            assert getattr(encoder.text, name) == value
        return encoder.pooling.name, encoder.normalize, encoder.text.query_max_tokens

    longest = Encoder.from_pretrained(checkpoint).text.encode_max_tokens
    parts = {"backbone": BackboneConfig(path=str(checkpoint)), "max_steps": 1}
    run = tmp_path / "run"
    config = tiny_config(data, run, **parts, pooling=PoolingConfig(), text=TextConfig())
    train_on_ranks(config, 1)
    assert settings(run) == ("cls", False, longest)
    shutil.rmtree(checkpoint)  # A run that goes on needs it no more.
    train_on_ranks(replace(config, max_steps=2), 1)
    assert settings(run) == ("cls", False, longest)
    other = replace(config, pooling=PoolingConfig(mode="mean"), max_steps=3)
    with pytest.raises(UserError, match=r"pooling\.mode: 'cls' -> 'mean'"):
        train_on_ranks(other, 1)


def test_a_checkpoint_whose_config_was_changed_by_hand(data, copy):
    path = checkpoint_path(copy / "checkpoints", STEPS) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["seed"] = 5
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"another config \(seed: 5 -> 0\)"):
        train_on_ranks(tiny_config(data, copy), 1)


def test_fewer_steps_than_were_taken(data, copy):
    with pytest.raises(UserError, match="was trained for 6 steps, more than max_steps=5"):
        train_on_ranks(tiny_config(data, copy, max_steps=5), 1)


def test_more_steps_go_on_and_the_log_has_each_once(data, copy):
    train_on_ranks(tiny_config(data, copy, max_steps=STEPS + 2), 1)
    steps = [e["step"] for e in entries(copy) if "train/loss" in e]
    assert steps == list(range(1, STEPS + 3))
    assert json.loads((copy / "evaluation.json").read_text())["max_steps"] == STEPS + 2


def test_steps_after_the_last_checkpoint_are_taken_again(data, copy):
    shutil.rmtree(checkpoint_path(copy / "checkpoints", STEPS))
    for step in list_checkpoints(copy / "checkpoints"):
        if step > STOP:
            shutil.rmtree(checkpoint_path(copy / "checkpoints", step))
    (copy / "evaluation.json").unlink()
    first = [e for e in entries(copy) if "train/loss" in e]
    train_on_ranks(tiny_config(data, copy), 1)
    again = [e for e in entries(copy) if "train/loss" in e]
    assert [e["step"] for e in again] == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/temperature"):
        assert [e[name] for e in again] == [e[name] for e in first]
    assert again[-1]["train/elapsed_s"] > again[0]["train/elapsed_s"] > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_weights_are_not_finite_ends_with_step_and_ranks(data, copy, world_size):
    shutil.rmtree(checkpoint_path(copy / "checkpoints", STEPS))
    kept = list_checkpoints(copy / "checkpoints")

    def train(config):
        plain = trainer.load_weights

        def spoilt(folder, step, state):
            plain(folder, step, state)
            next(state.encoder.parameters()).data.fill_(np.nan)

        trainer.load_weights = spoilt
        trainer.train(config)

    ranks = list(range(world_size))
    with pytest.raises(UserError) as caught:
        run_ranks(train, world_size, tiny_config(data, copy), init_group=False)
    assert str(caught.value).startswith(
        f"step {kept[-1] + 1}: loss or gradient is not finite (embeddings of ranks {ranks}"
    )
    assert list_checkpoints(copy / "checkpoints") == kept  # none with such weights


def test_weights_that_are_not_finite_are_not_exported(data, copy):
    file = checkpoint_path(copy / "checkpoints", STEPS) / "weights.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("encoder."))
    weights[name].view(-1)[-1] = np.inf
    save_file(weights, file)
    before = files(copy / "model")
    message = rf"step {STEPS}: the weight {name.removeprefix('encoder.')} has values that are not"
    with pytest.raises(UserError, match=message):
        export.run(ExportConfig(run=str(copy), checkpoint="last"))
    # A run that is over is exported again where its result was lost.
    (copy / "evaluation.json").unlink()
    config = tiny_config(
        data, copy, checkpoint=CheckpointConfig(keep_best=False, every_steps=2), eval=EvalConfig()
    )
    with pytest.raises(UserError, match=message):
        run_ranks(train_without_steps, 1, config, init_group=False)
    assert files(copy / "model") == before


def test_ranks_have_their_own_dropout_and_equal_weights(data, tmp_path):
    def train(config):
        trainer.train(config)
        return torch.get_rng_state()

    first, second = run_ranks(train, 2, tiny_config(data, tmp_path), init_group=False)
    assert not np.array_equal(first, second)
    random = load_file(checkpoint_path(tmp_path / "checkpoints", STEPS) / "random.safetensors")
    assert sorted(random) == ["cpu.0", "cpu.1"]
    assert np.array_equal(random["cpu.1"], second)


def test_a_run_logged_every_other_step_takes_the_same_steps(data, whole, tmp_path):
    logger = LoggerConfig(wandb="disabled", plots=False, every_steps=4)
    train_on_ranks(tiny_config(data, tmp_path, logger=logger), 1)
    steps = [e["step"] for e in entries(tmp_path) if "train/loss" in e]
    assert steps == [2, 3, 4, 6]  # also before each evaluation and checkpoint
    last = [
        load_file(checkpoint_path(run / "checkpoints", STEPS) / "weights.safetensors")
        for run in (whole, tmp_path)
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
