"""Options of fine-tuning as people type them: what arrives, and the one line that refuses them."""

import pytest

from largebatch.cli import app

SOURCE = "data.sources.mine.urls=[shards/]"


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """Collect the configs that commands would have run with."""
    found = []
    for command in ("train", "average"):
        monkeypatch.setattr(f"largebatch.commands.{command}.run", found.append)
    monkeypatch.chdir(tmp_path)
    return found


def one(configs, *line):
    assert app.main(list(line)) == 0
    return configs.pop()


def test_what_arrives(configs):
    config = one(configs, "train", SOURCE, "backbone.freeze=[positions,layers:2,'*.bias']")
    assert config.backbone.freeze == ["positions", "layers:2", "*.bias"]
    config = one(configs, "train", SOURCE, "backbone.freeze=layers:2")
    assert config.backbone.freeze == ["layers:2"]
    adapters = ("lora=all_linear", "backbone.path=folder", "lora.targets=[query,value]")
    config = one(configs, "train", SOURCE, *adapters)
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (16, 32, ["query", "value"])
    config = one(configs, "train", SOURCE, "schedule=inverse_sqrt", "schedule.warmup_steps=0.1")
    assert (config.schedule.name, config.schedule.warmup_steps) == ("inverse_sqrt", 0.1)
    config = one(configs, "train", SOURCE, "schedule.warmup_steps=700", "optim.ema=0.99")
    assert config.schedule.warmup_steps == 700
    assert isinstance(config.schedule.warmup_steps, int)
    assert config.optim.ema == 0.99


def test_tasks(configs):
    config = one(configs, "train", SOURCE, "text=kalm", "data.sources.mine.task=Find the code")
    assert config.text.query_prompt == "Instruct: {task} \n Query: "
    assert config.data.sources["mine"].task == "Find the code"
    config = one(configs, "train", SOURCE, "text.query_prompt='For {task}: '", "text.task=code")
    assert config.text.settings()["query_prompt"] == "For code: "


def test_average(configs):
    config = one(
        configs, "average", "models=[a/model,b/model]", "method=slerp", "weights=[0.7,0.3]"
    )
    assert (config.models, config.weights) == (["a/model", "b/model"], [0.7, 0.3])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["train", SOURCE, "lora.alpha=8"], "lora.alpha=8.0 does nothing with lora.r=0"),
        (["train", SOURCE, "backbone.freeze=[layers:0]"], "backbone.freeze: 'layers:0' must be"),
        (["train", SOURCE, "optim.lr_scaling=sqr"], "(did you mean 'sqrt'?)"),
        (["train", SOURCE, "optim.ema=0.9", "strategy=deepspeed"], "optim.ema=0.9 can't be used"),
        (["train", SOURCE, "schedule.warmup_steps=abc"], "schedule.warmup_steps=abc must be"),
        (["train", SOURCE, "text=e6"], "text=e6"),
        (["average", "models=[a]"], "models=['a'] must name two or more folders"),
    ],
)
def test_what_is_refused_in_one_line(configs, capsys, line, told):
    assert app.main(line) == 1
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert configs == []
