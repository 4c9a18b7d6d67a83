"""Whole runs with adapters or frozen parts: what is trained, saved, resumed and exported."""

import json
import shutil

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import tiny_encoder
from numerics.test_resume_exact import stopped_copy
from numerics.tiny_run import STEPS, same, tensors, tiny_config, write_data
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from largebatch.commands import export
from largebatch.config import BackboneConfig, ExportConfig, LoraConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.parallel.deepspeed_build import prepare
from largebatch.train import trainer

ZERO3 = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STRATEGIES = {
    "ddp": StrategyConfig(),
    "fsdp": StrategyConfig(name="fsdp"),
    "zero2": StrategyConfig(name="deepspeed", zero_stage=2),
    "zero3": StrategyConfig(name="deepspeed", zero_stage=3, config=ZERO3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import peft  # noqa: F401

    prepare(torch.device("cpu"))
    folder = write_data(tmp_path_factory.mktemp("data"))
    tiny_encoder(dtype=torch.float32).save_pretrained(folder / "model")
    return folder


def config_of(data, output, name="ddp", *, freeze=(), **lora):
    return tiny_config(
        data,
        output,
        strategy=STRATEGIES[name],
        backbone=BackboneConfig(path=str(data / "model"), freeze=list(freeze)),
        lora=LoraConfig(**lora),
    )


def train(config, ranks=2):
    run_ranks(trainer.train, ranks, config, init_group=False, timeout_s=200)


def weights_of(found):
    return {n.removeprefix("weights."): t for n, t in found.items() if n.startswith("weights.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_with_adapters(data, tmp_path, name, capfd):
    whole = tmp_path / "whole"
    config = config_of(data, whole, name, r=4, dropout=0.1)
    train(config)
    assert "are as they came, not trained" in capfd.readouterr().out

    # Only adapters and the temperature have moved; the rest is as it came, in every bit.
    plain = load_file(data / "model" / "model.safetensors")
    found = tensors(whole)
    moved = {n.removeprefix("optimizer.exp_avg.") for n in found if ".exp_avg." in n}
    assert moved == {n for n in weights_of(found) if ".lora_" in n or n.startswith("objective.")}
    for weight, tensor in weights_of(found).items():
        if ".lora_B" in weight:
            assert tensor.abs().max() > 0
        elif weight not in moved:
            own = weight.removeprefix("encoder.backbone.").replace(".base_layer", "")
            assert torch.equal(tensor, plain[own]), weight

    # Bit-identical when it goes on.
    copy = stopped_copy(whole, tmp_path / "copy")
    train(config_of(data, copy, name, r=4, dropout=0.1))
    assert same(tensors(copy), tensors(whole))

    # The exported folder is merged; `largebatch export` writes the same.
    step = json.loads((whole / "evaluation.json").read_text())["step"]
    exported = load_file(whole / "model" / "model.safetensors")
    assert exported.keys() == plain.keys()
    assert any(not torch.equal(exported[n], plain[n]) for n in plain)
    export.run(ExportConfig(run=str(whole), checkpoint=str(step), output_dir=str(tmp_path / "m")))
    again = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(again[n], exported[n]) for n in exported)
    texts = ["number 3 and 9", "query"]
    ours = Encoder.from_pretrained(whole / "model").encode(texts)
    theirs = SentenceTransformer(str(whole / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_with_frozen_parts(data, tmp_path, name):
    train(config_of(data, tmp_path / "run", name, freeze=["positions", "layers:1"]))
    plain = load_file(data / "model" / "model.safetensors")
    found = tensors(tmp_path / "run")
    moved = {n.removeprefix("optimizer.exp_avg.") for n in found if ".exp_avg." in n}
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    frozen = {n for n in plain if "position" in n or "layer.0." in n or "pooler" in n}
    assert len(frozen) == 19
    for weight, tensor in plain.items():
        key = f"encoder.backbone.{weight}"
        is_same = torch.equal(found[f"weights.{key}"], tensor)
        assert is_same == torch.equal(exported[weight], tensor) == (weight in frozen), weight
        assert (key in moved) == (weight not in frozen)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"r": 4, "targets": ["quary"]}, r"lora\.targets: 'quary' .* \(did you mean 'query'\?\)"),
        ({"freeze": ["layers:9"]}, r"backbone\.freeze: 'layers:9' is more than the 2 layers"),
    ],
)
def test_what_the_backbone_lacks_is_told_before_data_is_read(data, tmp_path, options, told):
    config = config_of(data, tmp_path / "run", **options)
    config.data.sources["tiny"].urls = [str(tmp_path / "nowhere")]
    with pytest.raises(UserError, match=told):
        train(config, 1)


def test_options_that_do_not_fit_together(data, tmp_path):
    with pytest.raises(UserError, match=r"backbone\.freeze=\['positions'\] with lora\.r=4"):
        config_of(data, tmp_path, freeze=["positions"], r=4)


def test_a_run_without_adapters_is_not_gone_on_with_by_one_that_has(data, tmp_path):
    folder = tmp_path / "run"
    train(config_of(data, folder), 1)
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08d}")
    with pytest.raises(UserError, match=r"lora\.r: 0 -> 4"):
        train(config_of(data, folder, r=4), 1)
