"""Which configs may continue a run."""

import json
from dataclasses import asdict, replace

import pytest

from largebatch.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HardwareConfig,
    LoggerConfig,
    OptimConfig,
    SourceConfig,
    TemperatureConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.train.resume import check_same_run

SOURCES = {"mine": SourceConfig(urls=["shards"])}
CONFIG = TrainConfig(data=DataConfig(sources=SOURCES))


def check(now):
    saved = json.loads(json.dumps(asdict(CONFIG)))  # as from state.json
    check_same_run(saved, asdict(now), folder="runs/x")


def test_the_same_config_continues():
    check(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 5000},
        {"tokens_per_chunk": 7, "keep": "all", "debug": True, "name": "other"},
        {"output_dir": "elsewhere"},
        {"logger": LoggerConfig(every_steps=9)},
        {"hardware": HardwareConfig(ranks=4, threads=2)},
        {"eval": EvalConfig(dev={"d": "folder"})},
        {"checkpoint": CheckpointConfig(keep_last=9)},
        {"data": DataConfig(sources=SOURCES, workers=3, prefetch=9, max_chars=10)},
        {"data": DataConfig(sources=SOURCES, on_fault="skip", read_timeout_s=5)},
        {"data": DataConfig(sources={"mine": SourceConfig(urls=["s3://moved/there"])})},
    ],
)
def test_how_and_how_long_may_change(changes):
    check(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"global_batch": 8}, "global_batch: 1024 -> 8"),
        ({"optim": OptimConfig(lr=1.0)}, "optim.lr: 0.0002 -> 1.0"),
        ({"temperature": TemperatureConfig(learned=True)}, "temperature.learned: False -> True"),
        ({"data": DataConfig(sources=SOURCES, lanes=3)}, "data.lanes: 64 -> 3"),
        (
            {"data": DataConfig(sources={"mine": SourceConfig(urls=["shards"], epochs=2)})},
            "data.sources.mine.epochs: None -> 2",
        ),
    ],
)
def test_what_is_trained_may_not(changes, shown):
    with pytest.raises(UserError) as caught:
        check(replace(CONFIG, **changes))
    message = str(caught.value)
    assert message.startswith(f"runs/x holds a run with another config ({shown})")
    assert "choose another output_dir" in message


def test_all_differences_are_shown_at_once():
    with pytest.raises(UserError, match=r"\(optim.lr: .*; seed: 0 -> 3\)"):
        check(replace(CONFIG, seed=3, optim=OptimConfig(lr=0.5)))


def test_an_option_that_the_older_run_did_not_have():
    saved = asdict(CONFIG)
    del saved["objective"]["symmetric"]
    with pytest.raises(UserError, match=r"objective\.symmetric: 'unset' -> False"):
        check_same_run(saved, asdict(CONFIG), folder="x")


def test_a_run_from_before_an_option_goes_on_with_it():
    saved = asdict(CONFIG)
    del saved["data"]["sources"]["mine"]["mask_same_id"]
    for value in (False, True):
        sources = {"mine": SourceConfig(urls=["shards"], mask_same_id=value)}
        now = replace(CONFIG, data=DataConfig(sources=sources))
        check_same_run(saved, asdict(now), folder="runs/x")
    with pytest.raises(UserError, match=r"data\.sources\.mine\.mask_same_id: False -> True"):
        check(now)
