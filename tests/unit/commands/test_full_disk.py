"""Every command that writes, where there is no room: one line that names the file, nothing left."""

import contextlib
import io
import json
import resource
import shutil

import pytest
from cli import SHORT_RUN, TINY_MODEL, write_retrieval_set, write_shards
from dist import run_ranks
from numerics.reference import tiny_encoder

from largebatch.cli.app import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Write what the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_shards(folder / "shards", num_records=300)
    write_retrieval_set(folder / "test")
    tiny_encoder().save_pretrained(folder / "model")
    rows = [{"query": f"query {n}", "document": f"text {n} {n * n}"} for n in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("".join(f"text {n}\n" for n in range(300)))
    shutil.copytree(folder / "shards", folder / "strange")
    (folder / "strange" / "index.json").unlink()
    return folder


TRAIN = [
    *TINY_MODEL, *SHORT_RUN, "logger=disabled", "logger.plots=false", "hardware.device=cpu",
    "hardware.threads=1",  # a forked process has no pool of threads
]  # fmt: skip
COMMANDS = {
    "shard": (["shard", "input=[IN/rows.jsonl]", "output_dir=OUT/new"], "new/shard-000000.tar"),
    "shard samples": (
        ["shard", "input=[IN/rows.jsonl]", "layout=samples", "output_dir=OUT/new"],
        "new/shard-000000.tar",
    ),
    "index": (["index", "shards=[OUT/strange/shard-*.tar]"], "strange/index"),
    "encode": (["encode", "model=IN/model", "input=IN/texts.txt", "output=OUT/e.npy"], "e.npy"),
    "evaluate": (
        ["evaluate", "model=IN/model", "sets.test=IN/test", "output=OUT/scores.json"],
        "scores.json",
    ),
    "dedup": (
        ["dedup", "sources.mine=IN/shards", "output_dir=OUT/new", "workers=1"],
        "new/",
    ),
    "data stats": (
        [
            "data",
            "stats",
            "global_batch=16",
            "data.sources.mine.urls=[IN/shards]",
            "stats_dir=OUT/new",
        ],
        "new/stats.json",
    ),
    "train": (["train", *TRAIN, "data.sources.a.urls=[IN/shards]", "output_dir=OUT/run"], "run/"),
}
ROOM = {"evaluate": 50, "index": 100, "data stats": 300}
"""Bytes that a file may have; a thousand otherwise."""


def run(line, room_bytes):
    """Run a command whose files may not be larger; return its exit code and stderr."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, resource.RLIM_INFINITY))
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main(line)
    return code, err.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room(inputs, tmp_path, command):
    words, name = COMMANDS[command]
    (tmp_path / "here").write_text("stays")
    if command == "index":
        shutil.copytree(inputs / "strange", tmp_path / "strange")
    before = sorted(tmp_path.rglob("*"))
    line = [word.replace("IN/", f"{inputs}/").replace("OUT", str(tmp_path)) for word in words]
    ((code, err),) = run_ranks(run, 1, line, ROOM.get(command, 1000), init_group=False)
    assert code == 1
    told = err.splitlines()[-1]
    assert told.startswith(f"error: {tmp_path}/{name}"), err
    assert "can't be written: file too large; raise the limit" in told
    assert "Traceback" not in err
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert [path for path in left if "partial" in path.name or "scratch" in path.name] == []
    if command not in ("dedup", "data stats", "train"):  # which leave their folder
        assert left == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("room_bytes", [5_000, 20_000, 60_000])
def test_no_room_for_what_a_run_leaves_ends_all_ranks(inputs, tmp_path, room_bytes, ranks):
    """The further it comes, the larger are the files that it writes."""
    line = ["train", *TRAIN, f"data.sources.a.urls=[{inputs}/shards]", f"output_dir={tmp_path}/run"]
    outcomes = run_ranks(run, ranks, line, room_bytes, init_group=False, timeout_s=100)
    for code, err in outcomes:
        assert code == 1
        assert f"error: {tmp_path}/run/" in err
        assert "can't be written: file too large" in err
    assert not list(tmp_path.rglob("*.partial"))
