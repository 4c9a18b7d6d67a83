"""The command line: what runs with which config, and one line for every mistake."""

import faulthandler
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from largebatch.cli import app, failures
from largebatch.cli.failures import RanksFailed
from largebatch.config import ExportConfig, IndexConfig, PoolingConfig, TrainConfig
from largebatch.errors import UserError

SOURCE = "data.sources.mine.urls=[shards/]"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", failures.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """Collect the configs that `train` would have run with in this process."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr("largebatch.commands.train.run", configs.append)
    return configs


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """Collect the command lines of ranks that would have been started."""
    lines: list[list[str]] = []
    monkeypatch.setattr(app, "launch", lambda line, **_: lines.append(line[4:]))
    return lines


def error_of(capsys, *arguments: str) -> str:
    """Run a command line that must fail; return its one line."""
    assert app.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def test_the_config_is_the_dataclass_and_leaves_nothing_behind(trained, tmp_path):
    assert app.main(["train", SOURCE, "optim.lr=1e-3", "pooling=cls"]) == 0
    (config,) = trained
    assert type(config) is TrainConfig
    assert config.data.sources["mine"].urls == ["shards/"]
    assert (config.optim.lr, config.pooling.mode) == (1e-3, "cls")
    assert config.output_dir == "runs/run"
    assert list(tmp_path.iterdir()) == []


def test_entries_of_mappings_need_no_plus(trained):
    overrides = [
        "data.sources.mine.urls=[a,b]",
        "data.sources.mine.fields.query=title",
        "eval.dev.my-set=folder",
        "backbone.config.hidden_size=64",
        "backbone.config.rope.type=linear",
    ]
    assert app.main(["train", *overrides]) == 0
    (config,) = trained
    assert config.data.sources["mine"].urls == ["a", "b"]
    assert config.data.sources["mine"].fields == {"query": "title"}
    assert config.eval.dev == {"my-set": "folder"}
    assert config.backbone.config == {"hidden_size": 64, "rope": {"type": "linear"}}


@pytest.mark.parametrize("line", [["quickstart"], ["experiment=quickstart"]])
def test_a_bare_word_is_a_preset_and_its_source_can_be_replaced(trained, line):
    others = ["data=custom", SOURCE, "eval=none", "hardware.ranks=1"]
    assert app.main(["train", *line, *others]) == 0
    (config,) = trained
    assert config.name == "quickstart"
    assert list(config.data.sources) == ["mine"]
    assert config.eval.test == {}


def test_a_scale_makes_any_experiment_small(trained):
    assert app.main(["train", SOURCE]) == 0
    assert app.main(["train", SOURCE, "scale=smoke"]) == 0
    others = ["data=custom", SOURCE, "eval=none", "hardware.ranks=1"]
    assert app.main(["train", "quickstart", *others, "scale=smoke", "max_steps=7"]) == 0
    assert [config.max_steps for config in trained] == [1000, 4, 7]
    assert trained[2].optim.lr == 5e-3
    assert trained[2].backbone.config["intermediate_size"] == 32


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainn"], "'trainn' is not a command; did you mean train? (commands: train, pairs,"),
        (["train", "quickstat"], "is not a preset of train; did you mean quickstart? (choices: "),
        (["train", "quickstart", "mine"], "'mine' is not option=value"),
        (["train", "optim.lrr=1"], "optim.lrr is not an option; did you mean optim.lr? (optim: lr"),
        (["train", "lr=1"], "lr is not an option; did you mean optim.lr?"),
        (["train", "poolin=cls"], "poolin is not an option; did you mean pooling?"),
        (["train", "exxperiment=x"], "did you mean experiment?"),
        (["train", "optim.lr.x=1"], "optim.lr is a number, so set it whole: optim.lr="),
        (["train", "optim={lrr: 1}"], "optim.lrr is not an option; did you mean optim.lr?"),
        (["train", "data.sources.a.url=[x]"], "did you mean data.sources.a.urls?"),
        (["train", "pooling=maen"], "pooling=maen is not a choice; did you mean mean? (choices:"),
        (["train", "pooling@optim=mean"], "leave it out"),
        (["train", "~pooling"], "only entries of a mapping can be removed"),
        (["train", "global_batch=abc"], "global_batch=abc must be a whole number"),
        (["train", "global_batch=1.5"], "global_batch=1.5 must be a whole number"),
        (["train", "optim.lr=abc"], "optim.lr=abc must be a number"),
        (["train", "pooling.normalize=maybe"], "pooling.normalize=maybe must be true or false"),
        (["train", "data.sources.a.urls=null"], "data.sources.a.urls=null must be a list"),
        (["train", "data.sources.a.urls="], "data.sources.a.urls= must be a list"),
        (["train", "data.sources.a.urls=[null]"], "data.sources.a.urls[0]=null must be text"),
        (["train", "data.curriculum=[{from_step: x}]"], "data.curriculum[0].from_step=x must be a"),
        (["train", "data.curriculum=[{from: 1}]"], "did you mean data.curriculum[0].from_step?"),
        (["train", SOURCE, "data.sources.mine.weight=-1"], "data.sources.mine.weight=-1.0 must be"),
        (["train", SOURCE, "data.curriculum=[{from_step: -1}]"], "data.curriculum[0].from_step=-1"),
        (["train", "data.sources.a.fields.qurey=x"], "data.sources.a.fields.qurey means nothing"),
        (["train", "strategy.config.fp16=5"], "strategy.config.fp16=5 must be a mapping"),
        (["train", SOURCE, "output_dir="], "output_dir is empty"),
        (["train", SOURCE, "optim.lr=inf"], "optim.lr=inf must be a finite number"),
        (["train", SOURCE, f"seed={10**20}"], "must be a whole number from 0 to 2^63 - 1"),
        (["train", SOURCE, "eval.dev.a="], "eval.dev.a is empty; name a folder"),
        (["train", "data.sources.a.urls=['']"], "data.sources.a.urls is empty; name its shards"),
        (["train", "data.sources.a.urls={b: c}"], "data.sources.a.urls={b: c} must be a list"),
        (["train", "tokens_per_chunk=1.5"], "=1.5 must be a whole number or text"),
        (["shard", "a.jsonl"], "for example: largebatch shard 'input=[pairs.jsonl]'"),
        (["evaluate", "model=m", "sets.a="], "sets.a is empty; name a folder"),
        (["shard", "input=[a.jsonl,'']"], "input is empty; name files"),
        (["shard", "input=a.jsonl", "output_dir="], "output_dir is empty; name a folder"),
        (["index", "shards=['']"], "shards is empty; name a folder with tar files"),
        (["verify", "shards=['']"], "shards is empty; name a folder with index.json"),
        (["encode", "model=m", "input=['']"], "input is empty; name a file"),
        (["dedup", "sources.a=x", "output_dir="], "output_dir is empty; name a folder"),
        (["export", "run=x", "output_dir="], "output_dir is empty; name a folder"),
        (["pairs", "output_dir="], "output_dir is empty; name a folder"),
        (["pairs", "paths=['']"], "paths is empty; name folders with Python packages"),
        (["data", "stats", SOURCE, "stats_dir="], "stats_dir is empty; name a folder"),
        (["dedup", "sources.a=x", "evaluation_sets.a="], "evaluation_sets.a is empty; name a"),
        (["train", "pooling=null"], "pooling=null is not a choice (choices: auto, cls, "),
        (["train", SOURCE, "~data.sources.its"], "has no entry 'its'; it has mine"),
        (["train", SOURCE, "~data.sources.mine.weight"], "set data.sources.mine.weight=null"),
        (["train", "optim..lr=1"], "'optim..lr' is not an option: it has an empty part"),
        (["train", "=1"], "'=1' is not option=value: there is no option before the ="),
        (["train", "--optim.lr", "1"], "options have no dashes: optim.lr=1"),
        (
            ["train", "--lr=1"],
            "is not a flag; and lr is not an option; did you mean optim.lr?",
        ),
        (["train", "optim.lr", "1"], "'optim.lr' is not option=value; write optim.lr=VALUE"),
        (["train", "output_dir=${USER}"], "the environment variable is ${oc.env:USER}"),
        (["train", "output_dir=${oc.env:NO_SUCH}"], "output_dir: Environment variable 'NO_SUCH'"),
        (["train", "data.sources=5"], "data.sources=5 must be a mapping"),
        (["train", "checkpoint=5"], "checkpoint=5 must be a group of options (every_steps, "),
        (["train", "scale=smoek"], "did you mean smoke? (choices: smoke)"),
        (["export", "debug=smoke"], "debug=smoke must be true or false"),
        (["train", "global_batch==3"], "'global_batch==3' cannot be read as option=value"),
        (["train", "output_dir=[a"], "'output_dir=[a' cannot be read as option=value"),
        (["train", "seed=1,2"], "'seed=1,2' has several values; add -m"),
        (["train", "-m", "seed=interval(1,2)"], "is not a list of values"),
        (["train", "output_dir=${seeed}"], "output_dir: Interpolation key 'seeed' not found"),
        (["train", "hydra.run.dir=x"], "hydra.run.dir would change nothing"),
        (["train", "hydra/launcher=basic"], "hydra/launcher would change nothing"),
        (["train", "_target_=os.system"], "_target_ is refused"),
        (["train", "backbone.config._target_=os.system"], "_target_ is refused"),
        (["train", "backbone.config.x={y: [{_target_: os.system}]}"], "_target_ is refused"),
        (["train"], "data.sources is empty"),
        (["train", "--multirum"], "--multirum is not a flag; did you mean --multirun?"),
        (["train", "--resolve"], "add --cfg job"),
        (["train", "-cd", "nowhere"], "--config-dir nowhere is not a folder"),
        (["export"], "run is empty"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_cure(capsys, trained, arguments, expected):
    assert expected in error_of(capsys, *arguments)
    assert trained == []


def test_all_faults_are_told_at_once(capsys):
    wrong = ["pooling.mode=maen", "optim.lr=-1", "global_batch=0", "data=custom"]
    line = error_of(capsys, "train", "quickstart", *wrong)
    for fault in ("did you mean 'mean'?", "optim.lr=-1.0", "global_batch=0", "sources is empty"):
        assert fault in line


def test_presets_of_the_users_own_are_found_and_checked(capsys, trained, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    preset = tmp_path / "own/experiment/mine.yaml"
    preset.write_text("# @package _global_\nname: mine\ndata: {sources: {a: {urls: [x]}}}\n")
    assert app.main(["train", "mine", "--config-dir", str(tmp_path / "own")]) == 0
    assert trained[0].name == "mine"
    preset.write_text("# @package _global_\noptim: {lrr: 3}\n")
    line = error_of(capsys, "train", "mine", "-cd", "own")
    assert line.startswith(
        "In 'experiment/mine': optim.lrr is not an option; did you mean optim.lr"
    )
    preset.write_text("# @package _global_\noptim: {lr: fast}\n")
    line = error_of(capsys, "train", "mine", "-cd", "own")
    assert line.startswith("In 'experiment/mine': optim.lr: Value 'fast'")
    preset.write_text("# @package _global_\ndata: {sources: {a: {urls: x}}}\n")
    line = error_of(capsys, "train", "mine", "-cd", "own")
    assert line == "In 'experiment/mine': data.sources.a.urls: it must be a list, such as [a, b]"
    preset.write_text("# @package _global_\neval: {dev: {2024: x}}\n")
    assert "eval.dev.2024: put quotes around" in error_of(capsys, "train", "mine", "-cd", "own")
    preset.write_text("# @package _global_\nbackbone: {config: {_target_: os.system}}\n")
    assert "_target_ is refused" in error_of(capsys, "train", "mine", "-cd", "own")


def test_a_command_without_presets_takes_those_of_the_user(capsys, monkeypatch, tmp_path):
    configs: list[IndexConfig] = []
    monkeypatch.setattr("largebatch.commands.index.run", configs.append)
    (tmp_path / "own/index").mkdir(parents=True)
    (tmp_path / "own/index/mine.yaml").write_text("# @package _global_\nworkers: 3\n")
    assert app.main(["index", "mine", "shards=a", "-cd", "own"]) == 0
    assert configs == [IndexConfig(shards=["a"], workers=3)]
    assert "'mine' is not option=value, and index has no presets" in error_of(
        capsys, "index", "mine"
    )


def test_a_sweep_gives_each_job_its_own_folder(trained):
    line = ["train", "-m", SOURCE, "temperature.value=0.02,0.05", "pooling=cls,mean"]
    assert app.main(line) == 0
    assert [(c.temperature.value, c.pooling.mode) for c in trained] == [
        (0.02, "cls"),
        (0.02, "mean"),
        (0.05, "cls"),
        (0.05, "mean"),
    ]
    assert trained[0].output_dir == "runs/run/temperature.value=0.02,pooling=cls"
    assert trained[0].name == "run/temperature.value=0.02,pooling=cls"
    assert len({config.output_dir for config in trained}) == 4


def test_a_sweep_keeps_folders_that_differ_already(trained):
    folder = "output_dir=mine/${temperature.value}"
    assert app.main(["train", "-m", SOURCE, "temperature.value=0.02,0.05", folder]) == 0
    assert [config.output_dir for config in trained] == ["mine/0.02", "mine/0.05"]
    trained.clear()
    assert app.main(["train", "-m", SOURCE, "temperature.value=0.02,0.05", "output_dir=mine"]) == 0
    assert trained[1].output_dir == "mine/temperature.value=0.05"


def test_a_sweep_gives_an_export_without_a_folder_one(monkeypatch):
    configs: list[ExportConfig] = []
    monkeypatch.setattr("largebatch.commands.export.run", configs.append)
    assert app.main(["export", "-m", "run=r", "checkpoint=1,2"]) == 0
    assert [config.output_dir for config in configs] == ["checkpoint=1", "checkpoint=2"]


def test_no_job_of_a_sweep_starts_if_one_is_wrong(capsys, trained):
    line = ["train", "-m", SOURCE, "temperature.value=0.02,-1"]
    assert "temperature.value=-1" in error_of(capsys, *line)
    assert trained == []


def test_ranks_get_a_command_line_that_composes_to_the_same_job(trained, launched):
    swept = ["train", "quickstart", "-m", "name='it\\'s a,b'", "text.query_prompt='a: ','b=c'"]
    assert app.main(swept) == 0
    assert len(launched) == 2
    assert trained == []
    for line in launched:
        assert app.main(["train", *line, "hardware.ranks=1"]) == 0
    assert [config.text.query_prompt for config in trained] == ["a: ", "b=c"]
    assert all(config.name.startswith("it's a,b/text.query_prompt=") for config in trained)
    assert len({config.output_dir for config in trained}) == 2


def test_a_rank_runs_in_place(trained, launched, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["--local_rank=1", "train", "quickstart"]) == 0
    assert launched == []
    assert trained[0].hardware.ranks == 2


def test_another_command_runs_with_its_own_config(monkeypatch):
    configs: list[IndexConfig] = []
    monkeypatch.setattr("largebatch.commands.index.run", configs.append)
    assert app.main(["index", "shards=[a.tar]"]) == 0
    assert configs == [IndexConfig(shards=["a.tar"])]


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (UserError("no shards\nin x"), "error: no shards in x"),
        (RanksFailed("rank 1 was ended by SIGKILL"), "error: rank 1 was ended by SIGKILL"),
        (ZeroDivisionError("by zero"), "error: ZeroDivisionError: by zero (run again with debug="),
    ],
)
def test_a_failure_is_one_line_and_with_debug_a_traceback(capsys, monkeypatch, raised, line):
    def fail(_):
        raise raised

    monkeypatch.setattr("largebatch.commands.train.run", fail)
    assert app.main(["train", SOURCE]) == 1
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
    assert app.main(["train", SOURCE, "debug=true"]) == 1
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (not isinstance(raised, RanksFailed))
    assert err.splitlines()[-1].startswith(line)


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("largebatch.commands.train.run", interrupt)
    assert app.main(["train", SOURCE]) == app.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_rank_0_alone_tells_what_every_rank_finds(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "0")
    assert "did you mean optim.lr?" in error_of(capsys, "train", "optim.lrr=1")
    # Another rank leaves time for that, and tells it only if nobody ends it meanwhile.
    waited = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert "did you mean optim.lr?" in error_of(capsys, "train", "optim.lrr=1")
    assert waited == [failures.RANK_0_SPEAKS_WITHIN_S]
    written = json.loads((tmp_path / "error.json").read_text())
    assert "did you mean optim.lr?" in written["message"]["extraInfo"]["py_callstack"]


def test_a_rank_tells_what_only_it_finds(capsys, monkeypatch):
    def fail(_):
        raise UserError("text 7 is too long")

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("largebatch.commands.train.run", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert error_of(capsys, "train", SOURCE) == "text 7 is too long"


def test_cfg_shows_the_config(capsys):
    assert app.main(["train", "quickstart", "--cfg", "job", "name=x"]) == 0
    out = capsys.readouterr().out
    assert "hidden_size: 192" in out
    assert "hydra" not in out
    assert app.main(["train", "name=x", "-c", "job", "--resolve"]) == 0
    assert "output_dir: runs/x\n" in capsys.readouterr().out
    assert app.main(["train", "--cfg", "job", "--package", "pooling"]) == 0
    shown = "".join(f"{option.name}: null\n" for option in fields(PoolingConfig))
    assert capsys.readouterr().out == shown
    assert app.main(["train", "quickstart", "--info", "defaults"]) == 0
    assert "experiment/quickstart" in capsys.readouterr().out
    assert app.main(["train", "quickstart", "--info", "all", "name=x"]) == 0
    out = capsys.readouterr().out
    assert out.count("Defaults List") == 1
    assert "name: x\n" in out


def test_help_lists_every_option_with_type_value_and_meaning(capsys):
    assert app.main(["train", "quickstart", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  global_batch  int  [1024]\n      Pairs per optimizer step" in out
    assert "  optim.lr  float  [0.005]\n      Highest learning rate." in out
    assert "  backbone.path  str or null  [null]" in out
    assert "quickstart_pretrained" in out
    assert "weighted_mean" in out


def run_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_the_program_is_quick_to_help_and_to_refuse():
    heavy = "{'torch', 'hydra', 'transformers', 'deepspeed', 'wandb', 'numpy'}"
    code = (
        "import sys; from largebatch.__main__ import main; code = main()\n"
        f"sys.exit(f'imported {{found}}' if (found := {heavy} & set(sys.modules)) else code)"
    )
    done = run_program("-c", code, "--help")
    assert done.returncode == 0, done.stderr
    assert "export      Write a checkpoint" in done.stdout
    code = code.replace("'hydra', ", "")
    done = run_program("-c", code, "train", "optim.lrr=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: optim.lrr is not an option"), done.stderr


def test_the_module_runs_and_says_its_version(tmp_path):
    done = run_program("-m", "largebatch", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("largebatch ")
    done = run_program("-m", "largebatch", "train", "quickstart", "pooling=maen")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: pooling=maen is not a choice; did you mean mean?")
    assert list(Path(tmp_path).iterdir()) == []


def test_of_repeated_overrides_the_last_wins(trained):
    assert app.main(["train", SOURCE, "max_steps=4", "max_steps=6", "max_steps=4"]) == 0
    assert trained[0].max_steps == 4


def test_a_rank_that_lost_another_one_is_not_the_cause(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    times = {}
    for name, message in (("cause", "a bug"), ("lost", "gloo: Connection closed by peer [::1]")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / name))
        failures.report(RuntimeError(message), debug=False)
        extra = json.loads((tmp_path / name).read_text())["message"]["extraInfo"]
        times[name] = int(extra["timestamp"])
    assert times["lost"] > times["cause"]
    cause, lost = capsys.readouterr().err.splitlines()
    assert "RuntimeError: a bug" in cause
    assert "connection to another rank was lost" in lost
    assert "gloo" not in lost


def test_a_list_that_may_be_unset_is_plain_data(trained):
    assert app.main(["train", SOURCE, "pooling.dense=[32,8]"]) == 0
    assert app.main(["train", SOURCE, "pooling.dense=16"]) == 0
    assert app.main(["train", SOURCE, "pooling.dense=null"]) == 0
    found = [config.pooling.dense for config in trained]
    assert found == [[32, 8], [16], None]
    assert type(found[0]) is list  # what config.yaml is written from
