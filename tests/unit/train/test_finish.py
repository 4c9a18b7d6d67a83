"""What follows the last step: killed anywhere, it is all there after the same command again."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from dist import run_ranks
from numerics.tiny_run import STEPS, STOP, tiny_config, train_on_ranks, write_data

from largebatch.config import CheckpointConfig, EvalConfig, LoggerConfig
from largebatch.model.encoder import Encoder
from largebatch.train import loggers, result, trainer
from largebatch.train.checkpoint import list_checkpoints

KILLED = 9


class Sent:
    """Stands in for wandb: notes what it is sent, and whether the run says that it is over."""

    def __init__(self, folder, **options):
        self.folder = folder

    def note(self, entry):
        with (self.folder / "sent.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def log(self, step, values):
        self.note({"step": step, **values})

    def finish(self, *, failed):
        self.note({"failed": failed, "is_over": (self.folder / "evaluation.json").exists()})


def draw(folder):
    """Stand in for the plots, which take seconds: one that shows which points there are."""
    points = [
        (entry["step"], sorted(entry)) for entry in loggers.read_metrics(folder / "metrics.jsonl")
    ]
    loggers.write_text(folder / "plots" / "points.png", json.dumps(points))


@pytest.fixture(scope="module", autouse=True)
def _stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "_WandbRun", Sent)
        patch.setattr(trainer, "draw_plots", draw)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    shutil.copytree(folder / "dev", folder / "test")
    return folder


def config(data, output, **changes):
    settings = {
        "logger": LoggerConfig(wandb="offline", plots=True),
        "eval": EvalConfig(
            dev={"dev": str(data / "dev")}, test={"test": str(data / "test")}, every_steps=2
        ),
        "checkpoint": CheckpointConfig(every_steps=STOP, keep_last=1),
    }
    return tiny_config(data, output, **(settings | changes))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_on_ranks(config(data, folder), 1)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return a run that was killed when its last checkpoint was in place."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    kill(config(data, folder), trainer, "remove_old", when="before")
    return folder


def kill(run_config, owner, name, *, when):
    """Train until something is called after the last checkpoint, and end the process there."""
    last = Path(run_config.output_dir) / "checkpoints" / f"step_{run_config.max_steps:08d}"

    def train(run_config):
        plain = getattr(owner, name)

        def deadly(*args, **kwargs):
            if when == "before" and last.is_dir():
                os._exit(KILLED)
            value = plain(*args, **kwargs)
            if last.is_dir():
                os._exit(KILLED)
            return value

        setattr(owner, name, deadly)
        trainer.train(run_config)

    with pytest.raises(RuntimeError, match=f"died with exit code {KILLED}"):
        run_ranks(train, 1, run_config, init_group=False)


def left(folder):
    """Return all that a run leaves, but for what depends on time."""

    def timeless(entry):
        times = ("_s", "_share", "memory_gib", "pairs_per_s", "tokens_per_s")
        return {key: value for key, value in entry.items() if not key.endswith(times)}

    return {
        "metrics": [
            timeless(json.loads(line))
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ],
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "model": {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted((folder / "model").rglob("*"))
            if path.is_file()
        },
        "plots": (folder / "plots" / "points.png").read_text(),
        "files": sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"
        ),
    }


def sent(folder):
    return [json.loads(line) for line in (folder / "sent.jsonl").read_text().splitlines()]


def test_an_undisturbed_run_logs_its_tests_once_and_is_over_last_of_all(whole):
    scored = [e for e in left(whole)["metrics"] if "eval/test/ndcg@10" in e]
    assert [entry["step"] for entry in scored] == [0, STEPS]
    assert (
        scored[-1]["eval/test/ndcg@10"] == left(whole)["evaluation"]["trained"]["eval/test/ndcg@10"]
    )
    assert sent(whole)[-1] == {"failed": False, "is_over": False}


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (trainer, "load_weights", "after"),
        (trainer.Evaluation, "score", "after"),
        (loggers.RunLog, "log", "after"),
        (Encoder, "save_pretrained", "after"),
        (trainer, "draw_plots", "before"),
        (trainer, "draw_plots", "after"),
        (trainer, "remove_old", "after"),
        (loggers.RunLog, "__exit__", "after"),
        (result, "write_text", "before"),
        (trainer, "write_result", "after"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kill_after_the_last_checkpoint_loses_nothing(
    data, whole, trained, tmp_path, owner, name, when
):
    copy = shutil.copytree(trained, tmp_path / "run")
    run_config = config(data, copy)
    kill(run_config, owner, name, when=when)
    if name == "write_result":
        assert left(copy) == left(whole)
    train_on_ranks(run_config, 1)
    assert left(copy) == left(whole)
    tests = [entry for entry in sent(copy) if "eval/test/ndcg@10" in entry]
    assert {entry["step"] for entry in tests} == {0, STEPS}


def test_a_run_that_is_over_does_nothing_and_says_so(data, whole, tmp_path, capfd):
    copy = shutil.copytree(whole, tmp_path / "run")
    (copy / "evaluation.json").touch()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    run_config = config(tmp_path / "gone", copy)
    run_config = replace(run_config, data=config(data, copy).data)
    run_ranks(trainer.train, 1, run_config, init_group=False)
    out = capfd.readouterr().out
    assert f"has all its {STEPS} steps, and nothing is left to do" in " ".join(out.split())
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    assert after == before


def test_a_result_that_is_torn_is_made_again(data, whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "run")
    (copy / "evaluation.json").write_text('{"max_steps": 6')
    train_on_ranks(config(data, copy), 1)
    assert left(copy) == left(whole)


def test_a_run_cut_short_to_its_checkpoint_has_its_last_dev_score(data, trained, tmp_path):
    """Step 3 was saved without an evaluation, which the last step of a run always has."""
    copy = shutil.copytree(trained, tmp_path / "run")
    for step in list_checkpoints(copy / "checkpoints"):
        if step > STOP:
            shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}")
    train_on_ranks(config(data, copy, max_steps=STOP), 1)
    found = left(copy)
    assert [e["step"] for e in found["metrics"] if "train/loss" in e] == [1, 2, 3]
    scores = {e["step"]: e["eval/dev/ndcg@10"] for e in found["metrics"] if "eval/dev/ndcg@10" in e}
    assert list(scores) == [0, 2, STOP]
    assert found["evaluation"]["max_steps"] == STOP
