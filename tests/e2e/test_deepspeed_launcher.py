"""The `deepspeed` launcher starts ranks of ours, and `largebatch train` starts DeepSpeed's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import largebatch, train_line, write_shards

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).parents[2] / "launch"


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(
    ("environment", "place"),
    [({"NPROC_PER_NODE": "2"}, "--num_gpus 2"), ({"HOSTFILE": "hosts"}, "--hostfile hosts")],
)
def test_what_the_script_calls(environment: dict[str, str], place: str) -> None:
    done = subprocess.run(
        [str(LAUNCH / "deepspeed.sh"), "a=b", "c=d e"],
        env=os.environ | {"PYTHON": "echo"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == (
        f"-m deepspeed.launcher.runner --master_port 29500 {place} "
        "--module largebatch train a=b c=d e\n"
    )


def test_both_launchers_train_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    line = train_line("strategy=deepspeed", "strategy.zero_stage=2", shards="shards")
    done = largebatch(*line, "output_dir=ours", cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), (done.out, done.err)
    options = [option for option in line[1:] if not option.startswith("hardware.ranks")]
    script = [str(LAUNCH / "deepspeed.sh"), *options, "output_dir=theirs"]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC_PER_NODE": "2",
        "MASTER_PORT": "29533",
        "PYTHON": sys.executable,
    }
    theirs = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), rel=1e-3)
