"""The moving average of the weights: what it is, and that it is scored, saved and exported."""

import json

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.test_resume_exact import stopped_copy
from numerics.tiny_run import STEPS, same, tensors, tiny_config, write_data
from safetensors.torch import load_file

from largebatch.commands import export
from largebatch.config import (
    CheckpointConfig,
    ExportConfig,
    OptimConfig,
    StrategyConfig,
)
from largebatch.errors import UserError
from largebatch.evaluate.beir import load_retrieval_set
from largebatch.evaluate.retrieval import evaluate_encoder
from largebatch.model.encoder import Encoder
from largebatch.parallel import average as average_module
from largebatch.parallel.collectives import Collectives
from largebatch.train import trainer

DECAY = 0.7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(data, output, name="ddp"):
    return tiny_config(
        data,
        output,
        optim=OptimConfig(lr=1e-2, ema=DECAY),
        strategy=StrategyConfig(name=name),
        checkpoint=CheckpointConfig(every_steps=1, keep_last=STEPS),
    )


def averages(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "average.safetensors")


def trained(folder, step):
    return {
        n.removeprefix("weights."): t
        for n, t in tensors(folder, step).items()
        if n.startswith("weights.encoder.") and ".pooler." not in n
    }


def plain_average(folder, first, before):
    """Return the average after the last step, from the weights after each, by the formula."""
    average = {name: tensor.double() for name, tensor in before.items()}
    for step in range(first, STEPS + 1):
        for name, weight in trained(folder, step).items():
            average[name] = DECAY * average[name] + (1 - DECAY) * weight.double()
    return average


def train(config, ranks=2):
    run_ranks(trainer.train, ranks, config, init_group=False)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_average_is_scored_saved_resumed_and_exported(data, tmp_path, name, capfd):
    whole = tmp_path / "whole"
    train(config_of(data, whole, name))
    assert "their moving average (optim.ema=0.7) is scored and exported" in capfd.readouterr().out

    # It is what the formula says.
    found = averages(whole, STEPS)
    expected = plain_average(whole, 2, averages(whole, 1))
    assert found.keys() == expected.keys()
    for weight, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[weight], rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, trained(whole, STEPS)[weight])

    # It is exported, and was what the scores are of.
    result = json.loads((whole / "evaluation.json").read_text())
    exported = load_file(whole / "model" / "model.safetensors")
    for weight, tensor in averages(whole, result["step"]).items():
        assert torch.equal(exported[weight.removeprefix("encoder.backbone.")], tensor)
    encoder = Encoder.from_pretrained(whole / "model")
    dev = load_retrieval_set(data / "dev", name="dev")
    scores = evaluate_encoder(encoder, dev, tokens_per_chunk=99, collectives=Collectives())
    assert scores["ndcg@10"] == pytest.approx(result["trained"]["eval/dev/ndcg@10"])
    target = tmp_path / "m"
    step = str(result["step"])
    export.run(ExportConfig(run=str(whole), checkpoint=step, output_dir=str(target)))
    again = load_file(target / "model.safetensors")
    assert all(torch.equal(again[n], exported[n]) for n in exported)

    # It goes on in every bit, and leaves the training alone.
    copy = stopped_copy(whole, tmp_path / "copy")
    for step in range(4, STEPS):
        for file in (copy / "checkpoints").glob(f"step_{step:08d}/*"):
            file.unlink()
    train(config_of(data, copy, name))
    assert same(tensors(copy), tensors(whole))
    assert same(averages(copy, STEPS), averages(whole, STEPS))
    without = config_of(data, tmp_path / "without", name)
    without.optim = OptimConfig(lr=1e-2)
    train(without)
    assert same(tensors(tmp_path / "without"), tensors(whole))


def test_it_begins_with_the_weights_that_the_run_begins_with(data, tmp_path):
    train(config_of(data, tmp_path / "run"), 1)
    first = averages(tmp_path / "run", 1)
    seen = {}

    def noted(self, strategy, decay):
        plain(self, strategy, decay)
        seen.update({n: t.clone() for n, t in self._averages.items()})

    plain = average_module.WeightAverage.__init__

    def on_rank(config):
        average_module.WeightAverage.__init__ = noted
        trainer.train(config)
        return seen

    (begun,) = run_ranks(on_rank, 1, config_of(data, tmp_path / "other"), init_group=False)
    for name, weight in trained(tmp_path / "run", 1).items():
        expected = DECAY * begun[name] + (1 - DECAY) * weight.numpy()
        np.testing.assert_allclose(first[name], expected, rtol=1e-4, atol=1e-7)


def test_what_it_does_not_go_with(data, tmp_path):
    with pytest.raises(UserError, match=r"optim\.ema=0\.7 can't be used with .*name=deepspeed"):
        tiny_config(
            data, tmp_path, optim=OptimConfig(ema=0.7), strategy=StrategyConfig(name="deepspeed")
        )
    with pytest.raises(UserError, match=r"optim\.ema=1\.0 must be at least 0 and below 1"):
        OptimConfig(ema=1.0)
