"""Whatever goes wrong: one line that names it, exit code 1, and no process left, within seconds."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cli import largebatch, running, train_line, write_retrieval_set, write_shards
from filelock import FileLock

from largebatch.data.text import train_tokenizer
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.find import resolve_source
from largebatch.shards.scan import build_index
from largebatch.world import part_of_rank

pytestmark = pytest.mark.slow

ENDED_WITHIN_S = 25
"""Less than the 30 that the launcher gives a rank after SIGTERM; a busy machine needs some."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Bad(NamedTuple):
    """What is wrong, as further options of a run that would otherwise work."""

    options: tuple[str | Path, ...]
    told: tuple[str, ...]
    """Parts of the one line: the thing, its value, the cure."""


def no_shards(folder: Path) -> Bad:
    return Bad(("~data.sources.tiny",), ("data.sources", "name one", "urls=[shards/]"))


def unknown_pooling(folder: Path) -> Bad:
    return Bad(("pooling=maen",), ("pooling", "maen", "mean", "cls"))


def missing_shard_folder(folder: Path) -> Bad:
    return Bad(
        ("data.sources.tiny.urls=[nowhere]",), ("no shards at nowhere", "there is no such folder")
    )


def empty_shard(folder: Path) -> Bad:
    (folder / "shards" / "shard-000001.tar").write_bytes(b"")
    return Bad((), ("shard-000001.tar has 0 bytes", "its index says", "largebatch index"))


def missing_field(folder: Path) -> Bad:
    return Bad(
        ("data.sources.tiny.fields.document=body",),
        ("member '0000", "fields.document='body'", "is not among its fields", "'query'"),
    )


def not_utf8(folder: Path) -> Bad:
    # As others wrote it, before it was indexed; what changed afterwards is told as a change.
    shutil.rmtree(folder / "shards")
    write_shards(folder / "shards", layout="samples")
    shard = folder / "shards" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a red cat", b"a \xff\xfed cat"))
    paths = sorted((folder / "shards").glob("*.tar"))
    build_index(paths, on_bytes=lambda _: None, on_fault=lambda _: None)
    return Bad((), (str(Path("shards") / shard.name), "member '0000", "is not UTF-8", "at byte"))


def changed_since_indexing(folder: Path) -> Bad:
    shard = folder / "shards" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    return Bad((), (str(Path("shards") / shard.name), "has changed since it was indexed"))


def text_of_1_mb(folder: Path) -> Bad:
    shutil.rmtree(folder / "shards")
    write_shards(folder / "shards", long_text=1_000_000)
    return Bad((), ("record 'record0'", "1,000,0", "data.max_chars=200000", "shorten it, or raise"))


def missing_model(folder: Path) -> Bad:
    return Bad(
        ("backbone=pretrained", "backbone.path=./no/model"),
        ("model folder './no/model' does not exist",),
    )


def pickle_only(folder: Path) -> Bad:
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return Bad(
        ("backbone=pretrained", "backbone.path=old"),
        ("model folder 'old'", "pickle only (pytorch_model.bin)", "convert it to safetensors"),
    )


def no_cuda(folder: Path) -> Bad:
    return Bad(("hardware.device=cuda",), ("cuda", "no GPU", "hardware.device=cpu"))


def no_retrieval_set(folder: Path) -> Bad:
    return Bad(("eval.dev.mine=nowhere",), ("eval.dev.mine", "nowhere", "no such folder"))


def broken_judgments(folder: Path) -> Bad:
    write_retrieval_set(folder / "set")
    (folder / "set" / "qrels" / "test.tsv").write_text("q500\td500\tvery\nq501\td501\tmuch\n")
    return Bad(
        ("eval.test.mine=set",), ("eval.test.mine", "test.tsv, line 2", "'much'", "whole number")
    )


def no_place_for_checkpoints(folder: Path) -> Bad:
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("not a folder")
    return Bad((), ("checkpoint", "run/checkpoints", "can't be written"))


def no_place_for_the_run(folder: Path) -> Bad:
    (folder / "run").write_text("not a folder")
    return Bad((), ("output_dir='run'", "can't be made"))


BAD = [
    no_shards,
    unknown_pooling,
    missing_shard_folder,
    empty_shard,
    missing_field,
    not_utf8,
    changed_since_indexing,
    text_of_1_mb,
    missing_model,
    pickle_only,
    no_cuda,
    no_retrieval_set,
    broken_judgments,
    no_place_for_checkpoints,
    no_place_for_the_run,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with shards/, where a run with `line()` works."""
    write_shards(tmp_path / "shards")
    return tmp_path


def line(*options: str | Path, ranks: int = 2) -> list[str]:
    return train_line("output_dir=run", *options, shards="shards", ranks=ranks)


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_input_ends_all_ranks_with_one_line(folder: Path, make: Callable[[Path], Bad]) -> None:
    bad = make(folder)
    done = largebatch(*line(*bad.options), cwd=folder)
    told = done.error()
    for part in bad.told:
        assert part in told
    assert done.ending_s < ENDED_WITHIN_S


def test_a_folder_in_use_is_not_touched(folder: Path) -> None:
    (folder / "run").mkdir()
    with FileLock(folder / "run" / ".lock"):
        done = largebatch(*line(), cwd=folder)
    assert "output_dir='run' is in use by another run" in done.error()
    assert done.ending_s < ENDED_WITHIN_S
    assert [path.name for path in (folder / "run").iterdir()] == [".lock"]


def test_a_hub_that_is_out_of_reach_is_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    model = ("backbone=pretrained", "backbone.path=models/mine")
    done = largebatch(*line(*model, ranks=1), cwd=folder, start=subprocess.Popen)
    assert "model 'models/mine' is no folder here, and as a hub name it can't" in done.error()
    assert done.ending_s < ENDED_WITHIN_S


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_that_one_rank_reads_ends_all(folder: Path, ranks: int) -> None:
    shard = damage_what_only_rank_1_reads(folder)
    done = largebatch(*line("backbone.tokenizer=tokenizer", ranks=ranks), cwd=folder)
    told = done.error()
    assert f"{shard}: no tar header at byte" in told
    assert done.ending_s < ENDED_WITHIN_S
    if ranks == 2:
        assert "4/4" not in done.out


def test_torchrun_ends_all_ranks_with_one_line_of_ours(folder: Path) -> None:
    done = largebatch(*line("pooling=maen"), cwd=folder, launcher=TORCHRUN)
    ours = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert (done.code, len(ours)) == (1, 1), done.err
    assert "maen" in ours[0]
    assert done.ending_s < ENDED_WITHIN_S

    shard = damage_what_only_rank_1_reads(folder)
    done = largebatch(*line("backbone.tokenizer=tokenizer"), cwd=folder, launcher=TORCHRUN)
    ours = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert done.code == 1
    assert f"{shard}: no tar header at byte" in done.err.partition("Root Cause")[2]
    assert any(f"{shard}: no tar header at byte" in text for text in ours)
    assert "gloo" not in done.err  # torchrun's own traceback is there, none of ours
    assert done.ending_s < ENDED_WITHIN_S


def test_rank_0_speaks_even_if_it_is_the_last_to_see_a_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0': time.sleep(5)\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "slow"))
    done = largebatch(*line("pooling=maen"), cwd=folder, launcher=TORCHRUN, start=subprocess.Popen)
    ours = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert (done.code, len(ours)) == (1, 1), done.err


def damage_what_only_rank_1_reads(folder: Path) -> Path:
    """Overwrite a shard, of one segment, that a run of 4 steps reads on rank 1 only."""
    shutil.rmtree(folder / "shards")
    write_shards(folder / "shards", records_per_shard=4)
    found = resolve_source([str(folder / "shards")])
    assert all(len(shard.segments) == 1 for _, shard in found)
    sizes = np.array([shard.num_records for _, shard in found])
    schedule = Schedule([SourceShape("tiny", sizes)], global_batch=16, seed=0, lanes=4)
    read = [
        {
            int(segment)
            for step in range(1, 5)
            for segment in schedule.rows(step, part_of_rank(16, rank, 2)).segments
        }
        for rank in range(2)
    ]
    file = found[min(read[1] - read[0])][1].file
    shard = folder / "shards" / file
    shard.write_bytes(b"x" * shard.stat().st_size)
    train_tokenizer(["red green blue cat dog 1 2 3"], vocab_size=300).save_pretrained(
        folder / "tokenizer"
    )
    return Path("shards") / file


LONG_RUN = ("max_steps=150", "checkpoint.every_steps=5", "global_batch=8")


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob("step_*"))


def test_a_killed_rank_ends_all_and_the_same_command_resumes(folder: Path) -> None:
    command = line(*LONG_RUN)
    with running(*command, cwd=folder) as run:
        run.wait_for(lambda: has_checkpoint(folder))
        run.since = time.monotonic()
        run.rank(1).kill()
        done = run.wait()
    assert done.error() == "rank 1 was ended by SIGKILL (out of memory?)"
    assert done.ending_s < ENDED_WITHIN_S

    steps = sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*"))
    assert steps[-1] < 150
    done = largebatch(*command, cwd=folder)
    assert (done.code, done.err) == (0, "")
    assert f"steps {steps[-1] + 1} to 150" in done.out
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [entry["step"] for entry in map(json.loads, lines) if "train/loss" in entry]
    assert logged == list(range(1, 151))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_quickly_and_quietly(folder: Path, ranks: int) -> None:
    with running(*line(*LONG_RUN, "max_steps=100000", ranks=ranks), cwd=folder) as run:
        run.wait_for(lambda: has_checkpoint(folder))
        run.since = time.monotonic()
        run.interrupt()
        done = run.wait()
    assert done.code == 130
    assert done.err == "interrupted\n"
    assert done.ending_s < ENDED_WITHIN_S
