"""`largebatch train` from shards to a scored model, and the commands that use what it leaves."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from cli import Done, largebatch, train_line, write_retrieval_set, write_shards

from largebatch.model.encoder import Encoder

pytestmark = pytest.mark.slow

TEXTS = ["a red cat", "stone", "the quick brown star of the north " * 8, ""]


class Run(NamedTuple):
    """A run that has ended, and what it was started by."""

    folder: Path
    """Where its command was typed; the run folder is `run` in it."""
    line: list[str]
    first: Done
    """What the command did."""

    def read(self, name: str) -> Any:
        return json.loads((self.folder / "run" / name).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train on two ranks, with all that a run can leave behind."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder / "shards")
    write_retrieval_set(folder / "dev")
    write_retrieval_set(folder / "test", num_documents=40)
    line = train_line(
        "output_dir=run",
        "eval.dev.near=dev",
        "eval.test.far=test",
        "eval.bm25=true",
        "text.query_prompt='query: '",
        "optim.lr=1e-2",
        "max_steps=6",
        "logger=offline",
        "logger.plots=true",
        shards="shards",
    )
    first = largebatch(*line, cwd=folder, start=subprocess.Popen)
    assert (first.code, first.err) == (0, ""), (first.out, first.err)
    return Run(folder, line, first)


def test_the_run_folder_holds_all_that_was_promised(run: Run) -> None:
    folder = run.folder / "run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["max_steps"], config["text"]["query_prompt"]) == (6, "query: ")
    entries = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "train/loss" in entry] == [1, 2, 3, 4, 5, 6]
    steps_of_dev = [entry["step"] for entry in entries if "eval/near/ndcg@10" in entry]
    assert (steps_of_dev[0], steps_of_dev[-1]) == (0, 6)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert checkpoints[-1] == "step_00000006"
    drawn = {path.stem for path in (folder / "plots").glob("*.png")}
    assert len(drawn) >= 6, drawn
    assert {"loss", "accuracy", "temperature"} <= drawn
    assert list((folder / "wandb").glob("*run-*"))
    assert (folder / "model" / "modules.json").is_file()
    assert (folder / "evaluation.json").is_file()
    assert not list(folder.rglob("*.partial"))


def test_the_table_has_the_scores(run: Run) -> None:
    result = run.read("evaluation.json")
    _, _, table = run.first.out.partition("retrieval after")
    for values, names in (
        (result["before"], ("near", "far", "far/bm25")),
        (result["trained"], ("near", "far")),
    ):
        for name in names:
            for metric in ("ndcg@10", "mrr@10", "recall@10"):
                assert f"{values[f'eval/{name}/{metric}']:.3f}" in table
    assert "run/model" in table


def test_the_same_command_again_only_repeats_the_result(run: Run) -> None:
    folder = run.folder / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    again = largebatch(*run.line, "hardware.ranks=1", cwd=run.folder)
    assert (again.code, again.err) == (0, "")
    assert "run has all its 6 steps" in again.out
    assert "loss" not in again.out
    assert (
        again.out.partition("retrieval after")[2] == run.first.out.partition("retrieval after")[2]
    )
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"config.yaml", ".lock"}


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("optim.lr=2e-3", ("optim.lr: 0.01 -> 0.002", "set these back", "output_dir")),
        ("max_steps=4", ("run was trained for 6 steps", "max_steps=4", "output_dir")),
    ],
)
def test_a_run_that_differs_is_refused(run: Run, option: str, told: tuple[str, ...]) -> None:
    error = largebatch(*run.line, option, "hardware.ranks=1", cwd=run.folder).error()
    for part in told:
        assert part in error


def test_sentence_transformers_gives_the_same_vectors(run: Run) -> None:
    from sentence_transformers import SentenceTransformer

    folder = str(run.folder / "run" / "model")
    theirs = SentenceTransformer(folder, device="cpu")
    ours = Encoder.from_pretrained(folder)
    for side in ("query", "document"):
        expected = theirs.encode(TEXTS, prompt_name=side if side == "query" else None)
        np.testing.assert_allclose(ours.encode(TEXTS, side=side), expected, atol=1e-5)
    queries, documents = (ours.encode(TEXTS, side=side) for side in ("query", "document"))
    assert np.abs(queries - documents).max() > 1e-3  # the prompt was exported


def test_evaluate_gives_the_scores_of_the_run(run: Run) -> None:
    done = largebatch(
        "evaluate", "model=run/model", "sets.x=test", "output=scores.json", cwd=run.folder
    )
    assert (done.code, done.err) == (0, "")
    scores = json.loads((run.folder / "scores.json").read_text())["sets"]["x"]["model"]
    trained = run.read("evaluation.json")["trained"]
    assert scores == pytest.approx(
        {name.rpartition("/")[2]: v for name, v in trained.items() if "/far/" in name}, abs=1e-6
    )


def test_encode_gives_the_vectors_of_the_encoder(run: Run) -> None:
    (run.folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    done = largebatch("encode", "model=run/model", "input=texts.txt", "side=query", cwd=run.folder)
    assert (done.code, done.err) == (0, "")
    assert "[4, 32]" in done.out
    found = np.load(run.folder / "embeddings.npy")
    expected = Encoder.from_pretrained(run.folder / "run" / "model").encode(TEXTS, side="query")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sweep_makes_a_run_folder_for_each_value(run: Run) -> None:
    line = train_line("output_dir=sweep", "max_steps=2", shards="shards", ranks=1)
    done = largebatch(*line, "-m", "temperature.value=0.05,0.1", cwd=run.folder)
    assert (done.code, done.err) == (0, "")
    folders = sorted(path.name for path in (run.folder / "sweep").iterdir())
    assert folders == ["temperature.value=0.05", "temperature.value=0.1"]
    for name, value in zip(folders, (0.05, 0.1), strict=True):
        folder = run.folder / "sweep" / name
        assert (folder / "model" / "modules.json").is_file()
        (first, *_) = (folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(first)["train/temperature"] == pytest.approx(value)


def test_more_steps_go_on_from_the_last_one(run: Run) -> None:
    """This comes last: it changes the run."""
    done = largebatch(*run.line, "max_steps=7", "hardware.ranks=1", cwd=run.folder)
    assert (done.code, done.err) == (0, "")
    assert "steps 7 to 7" in done.out
    assert run.read("evaluation.json")["max_steps"] == 7
