"""Averages of models: their formulas, and the folder that comes of it."""

import math
import shutil

import numpy as np
import pytest
import torch
from numerics.reference import WORDS, tiny_encoder
from numerics.tiny_run import STEPS, STOP, tiny_config, train_on_ranks, write_data
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from largebatch.commands import average
from largebatch.config import AverageConfig, BackboneConfig, LoraConfig
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model.average import mean, slerp
from largebatch.model.encoder import Encoder


def vectors(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(n)]


def test_the_mean():
    a, b, c = vectors(3)
    torch.testing.assert_close(mean([a, b, c], [1, 1, 2]), (a + b + 2 * c) / 4)


def test_slerp_is_the_arc():
    a, b = vectors(2)
    angle = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp([a, b], [7, 3]), expected)
    # On unit vectors it stays on the sphere, and divides the angle as the weights say.
    one, other = a / a.norm(), b / b.norm()
    between = slerp([one, other], [1, 1])
    assert float(between.norm()) == pytest.approx(1)
    assert float((between * one).sum()) == pytest.approx(math.cos(angle / 2))


def test_the_ends_of_slerp():
    a, b = vectors(2)
    torch.testing.assert_close(slerp([a, b], [1, 0]), a)
    torch.testing.assert_close(slerp([a, b], [0, 1]), b)
    torch.testing.assert_close(slerp([a, a, a], [1, 2, 3]), a)
    torch.testing.assert_close(slerp([a, 3 * a], [1, 1]), 2 * a)  # no angle: a line
    torch.testing.assert_close(
        slerp([torch.zeros(3), torch.ones(3)], [1, 1]), torch.full((3,), 0.5).double()
    )
    # Of three: the third from between the first two.
    c = vectors(1, seed=9)[0]
    torch.testing.assert_close(
        slerp([a, b, c], [1, 1, 2]), slerp([slerp([a, b], [1, 1]), c], [1, 1])
    )


def folders(tmp_path, *seeds, **settings):
    made = []
    for seed in seeds:
        folder = tmp_path / f"model{seed}"
        tiny_encoder(seed=seed, dtype=torch.float32, **settings).save_pretrained(folder)
        made.append(str(folder))
    return made


@pytest.mark.parametrize("method", ["mean", "slerp"])
def test_the_folder_that_comes_of_it(tmp_path, method, capsys):
    models = folders(tmp_path, 1, 2, 3)
    output = tmp_path / "averaged"
    weights = [1.0, 2.0, 3.0]
    average.run(
        AverageConfig(models=models, method=method, weights=weights, output_dir=str(output))
    )
    assert capsys.readouterr().out == f"{output}: the {method} of 3 models\n"
    states = [load_file(f"{model}/model.safetensors") for model in models]
    for name, tensor in load_file(output / "model.safetensors").items():
        own = [state[name] for state in states]
        expected = {"mean": mean, "slerp": slerp}[method](own, weights).float()
        torch.testing.assert_close(tensor, expected)
    ours = Encoder.from_pretrained(output).encode(WORDS[:5])
    theirs = SentenceTransformer(str(output), device="cpu").encode(WORDS[:5])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_of_one_model_twice_it_is_that_model(tmp_path):
    (model,) = folders(tmp_path, 1)
    average.run(AverageConfig(models=[model, model], output_dir=str(tmp_path / "out")))
    found, expected = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "out", model))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def other_architecture(folder):
    Encoder.from_scratch(
        "bert",
        tiny_encoder().tokenizer,
        config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 8, "max_position_embeddings": 48},
        query_max_tokens=16, document_max_tokens=40,
    ).save_pretrained(folder)  # fmt: skip


def other_tokenizer(folder):
    encoder = tiny_encoder(dtype=torch.float32)
    size = len(encoder.tokenizer)
    encoder.tokenizer = train_tokenizer([f"other{n} text" for n in range(80)], vocab_size=size)
    encoder.save_pretrained(folder)


def other_pooling(folder):
    tiny_encoder(dtype=torch.float32, pooling="cls").save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_architecture, "another architecture: hidden_size is 8, not 16"),
        (other_tokenizer, "another tokenizer"),
        (other_pooling, "another pooling: cls, not mean"),
    ],
)
def test_models_that_differ_are_refused(tmp_path, make, told):
    (model,) = folders(tmp_path, 1)
    make(tmp_path / "other")
    config = AverageConfig(
        models=[model, str(tmp_path / "other")], output_dir=str(tmp_path / "out")
    )
    with pytest.raises(UserError, match=rf"other can't be averaged with .*model1: {told}$"):
        average.run(config)
    assert not (tmp_path / "out").exists()


def test_prompts_are_the_first_ones(tmp_path, capsys):
    one = folders(tmp_path, 1, query_prompt="a: ")
    two = folders(tmp_path, 2, query_prompt="b: ")
    average.run(AverageConfig(models=one + two, output_dir=str(tmp_path / "out")))
    assert "model2 differs in query_prompt, taken from" in capsys.readouterr().out
    assert Encoder.from_pretrained(tmp_path / "out").text.query_prompt == "a: "


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"models": ["a"]}, r"models=\['a'\] must name two or more folders"),
        ({"models": ["a", "b"], "weights": [1.0]}, "weights has 1 numbers and models 2"),
        ({"models": ["a", "b"], "weights": [0.0, 0.0]}, "weights are all 0"),
        ({"models": ["a", "b"], "method": "slurp"}, r"method='slurp' .* \(did you mean 'slerp'"),
    ],
)
def test_options_that_are_wrong(options, told):
    with pytest.raises(UserError, match=told):
        AverageConfig(**options)


def test_what_is_no_folder():
    with pytest.raises(UserError, match="models: 'nowhere' is no folder"):
        average.run(AverageConfig(models=["nowhere", "b"], output_dir="out"))


@pytest.mark.parametrize("r", [0, 4])
def test_checkpoints_of_a_run(tmp_path, r):
    data = write_data(tmp_path)
    (model,) = folders(tmp_path, 1)
    run = tmp_path / "run"
    backbone = BackboneConfig(path=model)
    train_on_ranks(tiny_config(data, run, backbone=backbone, lora=LoraConfig(r=r)), 1)
    steps = [str(run / "checkpoints" / f"step_{step:08d}") for step in (STOP, STEPS)]
    average.run(AverageConfig(models=steps, output_dir=str(tmp_path / "out")))
    exported = []
    for step in steps:
        encoder = average._load(step)
        encoder.save_pretrained(tmp_path / "one")
        exported.append(load_file(tmp_path / "one" / "model.safetensors"))
        shutil.rmtree(tmp_path / "one")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, (exported[0][name] + exported[1][name]) / 2)
