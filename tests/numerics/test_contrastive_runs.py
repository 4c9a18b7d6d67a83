"""Whole runs of contrastive losses: they resume bit by bit, and say what they lack."""

import json
import shutil

import pytest
import torch
from dist import run_ranks
from numerics.reference import tiny_encoder
from numerics.tiny_run import STEPS, tensors, tiny_config, write_data

from largebatch.config import (
    DataConfig,
    EvalConfig,
    LossOptions,
    ObjectiveConfig,
    SourceConfig,
    TemperatureConfig,
)
from largebatch.errors import UserError
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer

ALL = ["query_document", "query_query", "document_query", "document_document"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write shards with and without negatives, and a guide that has their tokenizer."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    with ShardWriter(folder / "with_negatives", records_per_shard=40) as writer:
        for n in range(90):
            negatives = [f"document of {n + i}" for i in range(1, 1 + n % 3)]
            writer.write(Record(f"query {n}", f"document of {n}", negatives, "tiny", f"r{n}"))
    tiny_encoder(dtype=torch.float32, seed=4).save_pretrained(folder / "guide")
    return folder


def config(data, output, objective, *, shards="with_negatives", loss=None, **others):
    made = tiny_config(data, output, objective=objective, eval=EvalConfig(), **others)
    source = SourceConfig(urls=[str(data / shards)], loss=loss or LossOptions())
    made.data = DataConfig(sources={"tiny": source}, workers=0, lanes=4)
    return made


def test_a_run_with_a_guide_and_a_schedule_resumes(data, tmp_path):
    made = [
        config(
            data,
            tmp_path / name,
            ObjectiveConfig(
                candidates=ALL,
                mask_guide=str(data / "guide"),
                mask_margin=0.02,
                matryoshka_dims=[16, 4],
            ),
            temperature=TemperatureConfig(value=0.2, final_value=0.1, steps=4),
        )
        for name in ("whole", "parts")
    ]
    for one in made:
        one.backbone.tokenizer = str(data / "guide")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(trainer.train, 2, made[0], init_group=False)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step_{STEPS:08d}")
    (parts / "evaluation.json").unlink()
    run_ranks(trainer.train, 2, made[1], init_group=False)
    first, second = tensors(whole), tensors(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("guide" in name for name in first)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    temperatures = [line["train/temperature"] for line in lines if "train/temperature" in line]
    expected = [0.2, 0.175, 0.15, 0.125, 0.1, 0.1]
    assert temperatures == [pytest.approx(one) for one in expected]
    masked = [line["train/masked_share"] for line in lines if "train/masked_share" in line]
    assert max(masked) > 0
    assert all("train/loss_of_4" in line for line in lines if "train/loss" in line)

    # Another guide in the same place is told.
    shutil.rmtree(parts / "checkpoints" / f"step_{STEPS:08d}")
    (parts / "evaluation.json").unlink()
    kept = shutil.copytree(data / "guide", tmp_path / "kept")
    tiny_encoder(dtype=torch.float32, seed=8).save_pretrained(data / "guide")
    try:
        with pytest.raises(UserError, match=r"what objective\.mask_guide names is not what"):
            run_ranks(trainer.train, 1, made[1], init_group=False)
    finally:
        shutil.rmtree(data / "guide")
        shutil.copytree(kept, data / "guide")


@pytest.mark.parametrize("by_source", [True, False])
def test_without_negatives_there_is_nothing_to_learn(data, tmp_path, by_source):
    if by_source:
        objective, loss = ObjectiveConfig(), LossOptions(in_batch=False, negatives="own")
    else:
        objective, loss = ObjectiveConfig(in_batch=False, negatives="own"), None
    line = "data.sources.tiny: objective.name=contrastive needs negatives, and the records have no"
    lacking = config(data, tmp_path / "lacking", objective, shards="shards", loss=loss)
    with pytest.raises(UserError, match=line):
        run_ranks(trainer.train, 1, lacking, init_group=False)
    run_ranks(
        trainer.train, 2, config(data, tmp_path / "run", objective, loss=loss), init_group=False
    )
    assert tensors(tmp_path / "run")


def test_widths_that_the_model_lacks_end_the_run(data, tmp_path):
    objective = ObjectiveConfig(matryoshka_dims=[32, 8])
    with pytest.raises(UserError, match="has 32, and embeddings have 16 numbers"):
        run_ranks(trainer.train, 1, config(data, tmp_path / "run", objective), init_group=False)
