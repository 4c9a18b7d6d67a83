"""Runs of MLM and RetroMAE on texts and on pairs: they resume, on any ranks, and are exported."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from dist import run_ranks
from numerics.tiny_run import STEPS, same, tensors, tiny_config, train_on_ranks, write_data

from largebatch.config import (
    BackboneConfig,
    DataConfig,
    EvalConfig,
    LossOptions,
    ObjectiveConfig,
    PoolingConfig,
    SourceConfig,
    TemperatureConfig,
)
from largebatch.config.objective import MlmConfig, RetroMaeConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer
from largebatch.train.build import build_objective

OBJECTIVES = {
    "mlm": ObjectiveConfig(name="mlm"),
    "retromae": ObjectiveConfig(
        name="retromae",
        retromae=RetroMaeConfig(bag_of_words_weight=0.1, queries="embedded", decoder_masks=4),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write shards/ of pairs, texts/ without queries, and dev/."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    with ShardWriter(folder / "texts", records_per_shard=40, texts=True) as writer:
        for n in range(90):
            writer.write(Record("", f"{'number ' * (n % 7)}{n} and {n * n % 97}", [], "t", f"r{n}"))
    return folder


def config(data, output, kind, *, shards="texts", **changes):
    settings = {
        "objective": OBJECTIVES[kind],
        "temperature": TemperatureConfig(),
        "pooling": PoolingConfig(mode="cls"),
    }
    made = tiny_config(data, output, **(settings | changes))
    made.data = DataConfig(
        sources={"tiny": SourceConfig(urls=[str(data / shards)])}, workers=1, lanes=4
    )
    return made


def logged(folder, name="train/loss"):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shards"), [("mlm", "shards"), ("retromae", "texts")])
def test_it_resumes_bit_by_bit_and_its_encoder_goes_on(data, tmp_path, kind, shards):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on_ranks(config(data, whole, kind, shards=shards), 2)
    assert np.isfinite(logged(whole)).all()
    assert len(logged(whole)) == STEPS
    assert len(logged(whole, "eval/dev/ndcg@10")) == 4  # before, and at steps 2, 4, 6
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step_{STEPS:08d}")
    for file in ("evaluation.json", "checkpoints/best.json"):
        (parts / file).unlink(missing_ok=True)
    train_on_ranks(config(data, parts, kind, shards=shards), 2)
    assert same(tensors(whole), tensors(parts))
    names = {name for name in tensors(whole) if name.startswith("weights.objective.")}
    assert "weights.objective.head.dense.weight" in names
    assert ("weights.objective.decoder.query.weight" in names) == (kind == "retromae")

    exported = Encoder.from_pretrained(whole / "model")
    assert not any("decoder" in name for name, _ in exported.named_parameters())
    assert any(token.startswith("##") for token in exported.tokenizer.get_vocab())
    further = tiny_config(
        data,
        tmp_path / "contrastive",
        backbone=BackboneConfig(path=str(whole / "model")),
        max_steps=2,
        eval=EvalConfig(),
    )
    train_on_ranks(further, 1)
    assert len(logged(tmp_path / "contrastive")) == 2


def test_masks_are_the_same_on_any_number_of_ranks(data, tmp_path):
    losses = []
    for ranks in (1, 2, 3):
        one = config(data, tmp_path / str(ranks), "retromae", eval=EvalConfig(), max_steps=2)
        one.backbone.config["hidden_dropout_prob"] = 0.0
        one.backbone.config["attention_probs_dropout_prob"] = 0.0
        train_on_ranks(one, ranks)
        losses.append(logged(tmp_path / str(ranks)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": ObjectiveConfig()}, "needs queries, and its shards hold texts without them"),
        (
            {"objective": ObjectiveConfig(name="mlm", mlm=MlmConfig(sides="query"))},
            "needs queries",
        ),
        ({"pooling": PoolingConfig()}, r"pooling\.mode=mean reads another; use pooling=cls"),
    ],
)
def test_what_texts_cannot_train_ends_with_a_line_before_training(data, tmp_path, changes, line):
    with pytest.raises(UserError, match=line):
        run_ranks(
            trainer.train,
            1,
            config(data, tmp_path / "run", "retromae", **changes),
            init_group=False,
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"objective": replace(OBJECTIVES["mlm"], symmetric=True)}, "objective.symmetric=True"),
        ({"objective": replace(OBJECTIVES["mlm"], negatives="own")}, "objective.negatives=own"),
        (
            {"objective": replace(OBJECTIVES["mlm"], mask_duplicates=False)},
            "objective.mask_duplicates=False",
        ),
        ({"temperature": TemperatureConfig(learned=True)}, "temperature.learned=True"),
    ],
)
def test_options_of_pairs_mean_nothing_to_tokens_and_are_refused(data, tmp_path, changes, option):
    with pytest.raises(UserError) as error:
        build_objective(config(data, tmp_path / "run", "mlm", **changes))
    assert f"{option} does nothing for objective.name=mlm" in str(error.value)
    own = config(data, tmp_path / "run", "mlm")
    own.data.sources["tiny"].mask_same_id = True
    own.data.sources["tiny"].loss = LossOptions(symmetric=True)
    with pytest.raises(UserError, match=r"loss\.symmetric=True .*mask_same_id=true does nothing"):
        build_objective(own)


def test_options_of_another_objective_are_refused():
    with pytest.raises(UserError, match=r"objective\.mlm\.mask_share=0\.2 is for objective\.name"):
        ObjectiveConfig(name="retromae", mlm=MlmConfig(mask_share=0.2))
    for wrong in (
        {"mask_share": 0.0},
        {"mask_share": 1.0},
        {"sides": "left"},
        {"mask_token_share": 0.9, "random_token_share": 0.2},
    ):
        with pytest.raises(UserError, match=r"objective\.mlm\."):
            ObjectiveConfig(name="mlm", mlm=MlmConfig(**wrong))
    for wrong in (
        {"decoder_mask_share": 1.0},
        {"decoder_masks": 0},
        {"queries": "none"},
        {"bag_of_words_weight": -1.0},
    ):
        with pytest.raises(UserError, match=r"objective\.retromae\."):
            ObjectiveConfig(name="retromae", retromae=RetroMaeConfig(**wrong))
