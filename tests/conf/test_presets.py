"""Every preset composes, and the experiments' configs are what they were.

After a change that is meant, write the golden files anew and read the difference:
    LARGEBATCH_WRITE_GOLDEN=1 pytest tests/conf
"""

import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from largebatch.cli.compose import build, compose, resolve
from largebatch.cli.overrides import expand_preset
from largebatch.cli.presets import conf_folder, open_presets
from largebatch.cli.table import COMMANDS
from largebatch.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
CONF = conf_folder()
TRAIN = COMMANDS["train"]
SOURCE = "data.sources.mine.urls=[shards/]"

experiments = sorted(file.stem for file in CONF.glob("experiment/*.yaml"))
choices = sorted(
    (file.parent.name, file.stem)
    for file in CONF.glob("*/*.yaml")
    if file.parent.name not in {"experiment", *COMMANDS}
)


@pytest.mark.parametrize("name", experiments)
def test_experiment_is_as_golden(name):
    with open_presets(TRAIN) as presets:
        text = OmegaConf.to_yaml(resolve(compose(presets, expand_preset(presets, [name]))))
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("LARGEBATCH_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), "meant? then LARGEBATCH_WRITE_GOLDEN=1 pytest tests/conf"


def test_every_golden_file_has_its_experiment():
    assert sorted(file.stem for file in GOLDEN.glob("*.yaml")) == experiments


@pytest.mark.parametrize("name", experiments)
def test_experiment_passes_its_checks(name):
    needed = ["backbone.path=folder"] if "pretrained" in name else []
    with open_presets(TRAIN) as presets:
        config = build(TRAIN.config_class, compose(presets, [f"experiment={name}", *needed]))
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", experiments)
def test_experiment_file_opens_with_command_hardware_and_result(name):
    opening = (CONF / f"experiment/{name}.yaml").read_text().partition("defaults:")[0]
    for word in (f"largebatch train {name}", "# Hardware: ", "# Expected: "):
        assert word in opening


@pytest.mark.parametrize(("group", "choice"), choices)
def test_every_choice_composes_and_passes_its_checks(group, choice):
    needs_path = {("backbone", "pretrained"), ("lora", "all_linear")}
    needed = ["backbone.path=folder"] if (group, choice) in needs_path else []
    needed += [] if (group, choice) == ("data", "code") else [SOURCE]
    with open_presets(TRAIN) as presets:
        build(TRAIN.config_class, compose(presets, [f"{group}={choice}", *needed]))


@pytest.mark.parametrize(("group", "choice"), choices)
def test_every_choice_says_what_it_is(group, choice):
    lines = (CONF / group / f"{choice}.yaml").read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ") and "@package" not in line]
    assert len(comments) == 1
    assert 20 < len(comments[0]) < 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes(name):
    with open_presets(COMMANDS[name]) as presets:
        config = compose(presets, [])
    assert list(config) == [field.name for field in fields(COMMANDS[name].config_class)]


def test_a_pretrained_backbone_needs_its_path():
    with open_presets(TRAIN) as presets, pytest.raises(UserError, match=r"backbone\.path"):
        build(TRAIN.config_class, compose(presets, ["experiment=quickstart_pretrained"]))


def test_presets_are_found_in_an_installed_package_and_beside_that_of_a_checkout(
    monkeypatch, tmp_path
):
    assert conf_folder() == Path(__file__).resolve().parents[2] / "conf"
    package = tmp_path / "largebatch"
    shutil.copytree(CONF, package / "conf")
    monkeypatch.setattr("largebatch.__file__", str(package / "__init__.py"))
    assert conf_folder() == package / "conf"
    with open_presets(TRAIN) as presets:
        config = build(TRAIN.config_class, compose(presets, ["experiment=quickstart"]))
    assert config.name == "quickstart"
