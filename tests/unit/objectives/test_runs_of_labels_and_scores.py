"""Objectives that learn from scores, labels or single pairs: what they ask for, and whole runs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import config_of
from numerics.tiny_run import STEPS, same, tensors, tiny_config, write_data

from largebatch.config import (
    DataConfig,
    EvalConfig,
    LossOptions,
    ObjectiveConfig,
    SourceConfig,
    StrategyConfig,
    TemperatureConfig,
)
from largebatch.config.objective import DistillConfig, MatchConfig, SigmoidConfig, StsConfig
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.parallel.deepspeed_build import prepare
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer
from largebatch.train.build import build_objective, build_sources
from largebatch.train.feed import Feed
from largebatch.world import World

OBJECTIVES = {
    "sigmoid": ObjectiveConfig(name="sigmoid"),
    "distill": ObjectiveConfig(name="distill", distill=DistillConfig(contrastive_weight=0.2)),
    "margin_mse": ObjectiveConfig(name="distill", distill=DistillConfig(kind="margin_mse")),
    "cosent": ObjectiveConfig(name="sts"),
    "angle": ObjectiveConfig(name="sts", sts=StsConfig(kind="angle")),
}
STRATEGIES = {"sigmoid": "fsdp", "distill": "zero2", "cosent": "fsdp", "angle": "zero2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write pairs, pairs with negatives and scores, and pairs with labels."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    with (
        ShardWriter(folder / "scored", records_per_shard=40) as scored,
        ShardWriter(folder / "labelled", records_per_shard=40) as labelled,
    ):
        for n in range(90):
            pair = Record(f"query {n}", f"document of {n}", [], "tiny", f"r{n}")
            negatives = [f"document of {n + i}" for i in range(1, 1 + n % 3)]
            scores = [2.0, *(-i / 2 for i in range(len(negatives)))]
            scored.write(pair._replace(negatives=negatives, scores=scores))
            labelled.write(pair._replace(label=n % 6 / 5))
    return folder


def config(data, output, kind, *, shards=None, **changes):
    learned = kind == "distill"
    folder = {"sigmoid": "shards", "cosent": "labelled", "angle": "labelled"}.get(kind, "scored")
    source = {"urls": [str(data / (shards or folder))]} | changes.pop("source", {})
    made = tiny_config(
        data,
        output,
        objective=OBJECTIVES[kind],
        temperature=TemperatureConfig(value=0.1, learned=True) if learned else TemperatureConfig(),
        eval=EvalConfig(),  # so that the last weights are exported
        **changes,
    )
    made.data = DataConfig(sources={"tiny": SourceConfig(**source)}, workers=1, lanes=4)
    made.strategy = config_of(STRATEGIES[kind]) if kind in STRATEGIES else StrategyConfig()
    return made


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_trains_resumes_and_is_exported(data, tmp_path, kind):
    if STRATEGIES.get(kind) == "zero2":
        prepare(torch.device("cpu"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(trainer.train, 2, config(data, whole, kind), init_group=False)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step_{STEPS:08d}")
    (parts / "evaluation.json").unlink()
    run_ranks(trainer.train, 2, config(data, parts, kind), init_group=False)
    assert same(tensors(whole), tensors(parts))
    logged = metrics(whole)
    assert len(logged) == STEPS
    assert all(np.isfinite(line["train/loss"]) and line["train/loss"] > 0 for line in logged)
    if kind == "sigmoid":
        assert {"weights.objective.bias", "weights.objective.log_scale"} <= tensors(whole).keys()
        assert logged[-1]["train/bias"] != -10
    if kind == "distill":
        assert "weights.objective.contrastive.temperature.log_scale" in tensors(whole)
        assert 0 <= logged[-1]["train/agreement"] <= 1
    assert Encoder.from_pretrained(whole / "model").encode(["query 3"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("kind", "shards", "source", "line"),
    [
        ("distill", "shards", {}, "needs negatives"),
        ("distill", "scored", {"max_negatives": 0}, "needs negatives"),
        ("distill", "scored", {"fields": {"scores": "none"}}, "needs a teacher's scores"),
        ("cosent", "shards", {}, "needs a number that each pair's similarity is to follow"),
    ],
)
def test_a_source_that_lacks_a_field_ends_with_a_line(data, tmp_path, kind, shards, source, line):
    run_config = config(data, tmp_path / "run", kind, shards=shards, source=source)
    objective = build_objective(run_config)
    feed = Feed(run_config, tmp_path, World(), first_step=0, fields=objective.fields)
    name = run_config.objective.name
    with pytest.raises(UserError, match=rf"^data\.sources\.tiny: objective\.name={name} {line}"):
        feed.check_fields(objective.needs)


def test_sources_have_what_they_need(data, tmp_path):
    for kind, fields, needs in [
        ("distill", {}, ["scores"]),
        ("cosent", {"scores": "none", "label": "auto"}, ["label"]),
        ("sigmoid", {"scores": "none"}, []),
    ]:
        run_config = config(data, tmp_path / "run", kind)
        objective = build_objective(run_config)
        (source,) = build_sources(run_config, objective.fields)
        assert (source.fields, source.needs) == (fields, needs)
        feed = Feed(run_config, tmp_path, World(), first_step=0, fields=objective.fields)
        feed.check_fields(objective.needs)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: SigmoidConfig(scale=0), "objective.sigmoid.scale=0 must be above 0"),
        (lambda: SigmoidConfig(bias=float("nan")), "objective.sigmoid.bias=nan must be a finite"),
        (lambda: DistillConfig(kind="kd"), "objective.distill.kind='kd' is not one of"),
        (lambda: DistillConfig(teacher_temperature=0), "teacher_temperature=0 must be above 0"),
        (lambda: DistillConfig(contrastive_weight=-1), "contrastive_weight=-1 must be at least 0"),
        (
            lambda: DistillConfig(kind="margin_mse", teacher_temperature=2.0),
            "teacher_temperature is for objective.distill.kind=kl",
        ),
        (
            lambda: DistillConfig(kind="margin_mse", scale_by_t2=True),
            "scale_by_t2 is for objective.distill.kind=kl",
        ),
        (
            lambda: ObjectiveConfig(name="match"),
            "objective.name=match needs objective.match.teacher; name a model folder",
        ),
        (lambda: MatchConfig(contrastive_weight=-1), "contrastive_weight=-1 must be at least 0"),
        (lambda: StsConfig(kind="cos"), "objective.sts.kind='cos' is not one of"),
        (lambda: StsConfig(scale=0), "objective.sts.scale=0 must be above 0"),
        (
            lambda: ObjectiveConfig(name="sigmoid", sts=StsConfig(scale=1)),
            "objective.sts.scale=1 is for objective.name=sts",
        ),
    ],
)
def test_wrong_options_are_told(make, line):
    with pytest.raises(UserError) as caught:
        make()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "objective", "line"),
    [
        ("sigmoid", {}, {"symmetric": True}, "objective.symmetric=True does nothing"),
        ("sigmoid", {}, {"negatives": "own"}, "objective.negatives=own does nothing"),
        ("cosent", {}, {"mask_duplicates": False}, "objective.mask_duplicates=False does nothing"),
        ("margin_mse", {}, {"symmetric": True}, "objective.symmetric=True does nothing"),
        (
            "cosent",
            {"temperature": TemperatureConfig(value=0.02)},
            {},
            "temperature.value=0.02 does nothing for objective.name=sts",
        ),
        (
            "margin_mse",
            {"temperature": TemperatureConfig(learned=True)},
            {},
            "temperature.learned=True does nothing",
        ),
        (
            "cosent",
            {"source": {"mask_same_id": True}},
            {},
            "data.sources.tiny.mask_same_id=true does nothing",
        ),
        (
            "margin_mse",
            {"source": {"loss": LossOptions(symmetric=True)}},
            {},
            "data.sources.tiny.loss.symmetric=True does nothing",
        ),
        (
            "sigmoid",
            {"source": {"loss": LossOptions(negatives="own")}},
            {},
            "data.sources.tiny.loss.negatives=own does nothing for objective.name=sigmoid",
        ),
        (
            "sigmoid",
            {"source": {"fields": {"label": "score"}}},
            {},
            "data.sources.tiny.fields.label=score is nothing that objective.name=sigmoid learns",
        ),
        (
            "cosent",
            {"source": {"fields": {"scores": "s"}}},
            {},
            "data.sources.tiny.fields.scores=s is nothing that objective.name=sts learns",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(data, tmp_path, kind, changes, objective, line):
    temperature = changes.pop("temperature", None)
    run_config = config(data, tmp_path / "run", kind, **dict(changes))
    if temperature is not None:
        run_config = replace(run_config, temperature=temperature)
    run_config = replace(run_config, objective=replace(run_config.objective, **objective))
    with pytest.raises(UserError) as caught:
        build_objective(run_config)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_labels_are_warned_of():
    from largebatch.objectives.sts import SimilarityOrder
    from largebatch.step.objective import SourceNote

    objective, sources = SimilarityOrder(), [SourceNote("sts", False)]
    assert objective.warning({"ordered_share": 0.4}, sources) is None
    assert "all labels of its batch (source sts)" in objective.warning(
        {"ordered_share": 0.0}, sources
    )


def test_a_teacher_of_another_width_is_refused_and_one_of_the_same_is_matched(data, tmp_path):
    def run(name, width):
        teacher = Encoder.from_scratch(
            "bert",
            train_tokenizer(["query document of 0 1 2 3 4 5 6 7 8 9"], vocab_size=60),
            config={"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 16, "max_position_embeddings": 64},
            query_max_tokens=32, document_max_tokens=32,
        )  # fmt: skip
        teacher.save_pretrained(tmp_path / "teacher")
        run_config = config(data, tmp_path / name, "sigmoid")
        run_config.backbone.tokenizer = str(tmp_path / "teacher")
        run_config.objective = ObjectiveConfig(
            name="match", match=MatchConfig(teacher=str(tmp_path / "teacher"))
        )
        run_ranks(trainer.train, 2, run_config, init_group=False)
        return metrics(tmp_path / name)

    with pytest.raises(UserError, match=r"objective\.match\.teacher=.* of 12 numbers, and the mod"):
        run("wrong", 12)
    for line in run("right", 16):
        cosine = line["train/teacher_cosine"]
        assert line["train/loss"] == pytest.approx(2 - 2 * cosine, rel=1e-4)
