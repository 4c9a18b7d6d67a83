"""All GPUs of this machine, a rank each, over NCCL: gathers, and every strategy's gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STRATEGIES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
RANKS = Path(__file__).with_name("strategies_on_ranks.py")


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient(device, strategy):
    import torch

    run(["--nproc-per-node", str(torch.cuda.device_count())], "cuda", strategy)


def run(launcher_options, device, strategy):
    """Run the ranks; what they print is told if they fail."""
    tests = str(RANKS.parents[1])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", *launcher_options,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            str(RANKS), device, strategy,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, str(RANKS.parents[2])])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
