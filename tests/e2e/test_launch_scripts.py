"""launch/: what torchrun.sh calls, and what setup.sh says where it cannot work."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, timeout=60, env=env
    )


def test_torchrun_on_one_machine() -> None:
    done = run(LAUNCH / "torchrun.sh", "a=b", "c=d e", PYTHON="echo", NPROC_PER_NODE="2")
    expected = "--standalone --nproc-per-node 2 -m largebatch train a=b c=d e"
    assert done.stdout == f"-m torch.distributed.run {expected}\n"


def test_torchrun_on_two_machines() -> None:
    places = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC_PER_NODE": "8"}
    done = run(LAUNCH / "torchrun.sh", "a=b", PYTHON="echo", **places)
    assert "--nnodes 2 --node-rank 1 --master-addr first --master-port 29500" in done.stdout
    assert done.stdout.endswith("--nproc-per-node 8 -m largebatch train a=b\n")


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_torchrun_names_what_is_missing(missing: str) -> None:
    places = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"} | {missing: ""}
    done = run(LAUNCH / "torchrun.sh", PYTHON="echo", **places)
    assert done.returncode != 0
    assert f"{missing}: is not set" in done.stderr


@pytest.fixture
def setup_script(tmp_path: Path) -> Path:
    """Copy setup.sh to where it finds no .venv."""
    (tmp_path / "launch").mkdir()
    return shutil.copy(LAUNCH / "setup.sh", tmp_path / "launch" / "setup.sh")


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_setup_names_a_missing_python(setup_script: Path) -> None:
    done = run(setup_script, PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no no-such-python here; largebatch needs Python 3.11+" in done.stderr


def test_setup_refuses_an_old_python(setup_script: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, '[ "$1" = -V ] && echo Python 3.10.1; exit 1')
    done = run(setup_script, PYTHON=python)
    assert done.returncode == 1
    assert "is Python 3.10.1; largebatch needs Python 3.11+" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_names_a_missing_venv_module(setup_script: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, 'case "$2" in *ensurepip*) exit 1;; esac')
    done = run(setup_script, PYTHON=python)
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
