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
    ObjectiveConfig,
    OptimConfig,
    SourceConfig,
    TemperatureConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.train.checkpoint import FORMAT, checkpoint_path
from largebatch.train.resume import check_same_run, read_run_details

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
    check_same_run(saved, asdict(CONFIG), folder="x")  # its default changes nothing
    now = replace(CONFIG, objective=ObjectiveConfig(symmetric=True))
    with pytest.raises(UserError, match=r"objective\.symmetric: 'unset' -> True"):
        check_same_run(saved, asdict(now), folder="x")
    saved = asdict(CONFIG)
    del saved["data"]["sources"]["mine"]["loss"]["symmetric"]
    check_same_run(saved, asdict(CONFIG), folder="x")


def test_a_run_from_before_an_option_goes_on_with_it():
    saved = asdict(CONFIG)
    del saved["data"]["sources"]["mine"]["mask_same_id"]
    del saved["objective"]["mlm"], saved["objective"]["retromae"]
    for value in (False, True):
        sources = {"mine": SourceConfig(urls=["shards"], mask_same_id=value)}
        now = replace(CONFIG, data=DataConfig(sources=sources))
        check_same_run(saved, asdict(now), folder="runs/x")
    with pytest.raises(UserError, match=r"data\.sources\.mine\.mask_same_id: False -> True"):
        check(now)


def read(folder, engine):
    """Write state.json of two ranks' checkpoint, and read it."""
    path = checkpoint_path(folder, 3) / "state.json"
    path.parent.mkdir()
    content = {
        "format": FORMAT, "step": 3, "world_size": 2, "best": None, "config": {},
        "elapsed_s": 1.0, "shards": {}, "engine": engine,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return read_run_details(folder, 3)["engine"]


def test_a_checkpoint_from_before_each_rank_had_its_own_numbers(tmp_path):
    least = {"tokens_per_chunk": 64, "keep_plan": None}
    assert read(tmp_path, least)["of_ranks"] == [least, least]


@pytest.mark.parametrize("of_ranks", [[], [{}] * 3, {}, None])
def test_numbers_of_other_ranks_than_there_were(tmp_path, of_ranks):
    engine = {"tokens_per_chunk": 64, "keep_plan": None, "of_ranks": of_ranks}
    with pytest.raises(UserError, match=r"is damaged: engine\.of_ranks is not a list of all ranks"):
        read(tmp_path, engine)
