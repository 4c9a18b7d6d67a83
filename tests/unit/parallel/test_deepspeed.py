"""DeepSpeed's config, what it refuses, and the extension that it compiles for CPU ranks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from dist import run_ranks
from numerics.reference import tiny_encoder, tiny_loss

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.parallel import deepspeed_build
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed import DeepSpeedModel
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.deepspeed_config import engine_config

CPU = torch.device("cpu")


def test_any_key_of_deepspeeds_config_can_be_set():
    given = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "overlap_comm": False},
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
    }
    found = engine_config(StrategyConfig(name="deepspeed", zero_stage=3, config=given))
    assert found["zero_optimization"] == given["zero_optimization"] | {"stage": 3}
    assert found["steps_per_print"] == 7
    assert found["wall_clock_breakdown"] is True
    assert found["gradient_clipping"] == 0
    assert given["zero_optimization"].keys() == {"offload_optimizer", "overlap_comm"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"gradient_clipping": 1.0}, r"config\.gradient_clipping is set by optim\.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, r"config\.optimizer is set by optim"),
        ({"zero_optimization": {"stage": 1}}, r"stage is set by strategy\.zero_stage"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled=true is not supported"),
    ],
)
def test_what_largebatch_decides_is_refused_there(config, says):
    with pytest.raises(UserError, match=says):
        StrategyConfig(name="deepspeed", config=config)


def test_wrong_strategies():
    with pytest.raises(UserError, match=r"zero_stage=4 is not one of 0, 1, 2, 3"):
        StrategyConfig(name="deepspeed", zero_stage=4)
    with pytest.raises(UserError, match=r"strategy\.config is DeepSpeed's config, and .*=fsdp"):
        StrategyConfig(name="fsdp", config={"steps_per_print": 1})
    with pytest.raises(UserError, match=r"'dpp' is not one of .*did you mean 'ddp'"):
        StrategyConfig(name="dpp")


def make(stage, config):
    encoder, loss = (module(dtype=torch.float32) for module in (tiny_encoder, _loss))
    strategy = StrategyConfig(name="deepspeed", zero_stage=stage, config=config)
    modules = {"encoder": encoder, "objective": loss}
    return DeepSpeedModel(modules, OptimConfig(), Collectives(), CPU, strategy)


def _loss(dtype):
    return tiny_loss(symmetric=False, dtype=dtype)


@pytest.fixture(scope="module")
def extension():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(CPU)


@pytest.mark.parametrize(
    ("stage", "config", "says"),
    [
        # DeepSpeed 0.19.8: what adds gradients up over chunks "does not yet support optimizer
        # wrapper BF16_Optimizer".
        (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "makes Deep"),
        (0, {"bf16": {"enabled": True}}, r"zero_stage=0 with the precision in strategy\.config"),
        (2, {"zero_optimization": {"no_such_key": 1}}, r"refuses .*no_such_key"),
    ],
    ids=["bf16 and ZeRO 1", "bf16 and ZeRO 0", "unknown key"],
)
def test_what_deepspeed_can_not_do_here(extension, stage, config, says):
    with pytest.raises(UserError, match=says) as caught:
        run_ranks(make, 2, stage, config, timeout_s=60)
    assert "\n" not in str(caught.value)


def test_a_gpu_needs_no_extension(monkeypatch):
    monkeypatch.setattr(deepspeed_build, "_quiet_import", None)
    prepare(torch.device("cuda", 0))


def build_elsewhere(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Prepare in a process of its own."""
    code = (
        "import torch; from largebatch.errors import UserError\n"
        "from largebatch.parallel.deepspeed_build import prepare\n"
        "try: prepare(torch.device('cpu'))\n"
        "except UserError as error: print(error)"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_without_a_compiler_it_says_so_at_once(tmp_path):
    done = build_elsewhere(tmp_path, CXX="no-such-compiler")
    assert done.stdout == (
        "strategy=deepspeed on CPU builds an extension once, and the compiler 'no-such-compiler' "
        "is not there; install g++, set CXX, or use strategy=ddp or strategy=fsdp\n"
    )
    assert done.stderr == ""


def test_a_compiler_that_fails(tmp_path):
    done = build_elsewhere(tmp_path, CXX="false")
    assert "builds an extension in" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_cache_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = build_elsewhere(tmp_path / "file" / "cache")
    assert "can't be written" in done.stdout
    assert "set TORCH_EXTENSIONS_DIR" in done.stdout


def test_a_lock_that_a_killed_build_left_is_in_nobodys_way(extension):
    cache = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    (folder,) = (path.parent for path in cache.glob("*/deepspeed_shm_comm.so"))
    (folder / "lock").write_text("")
    started = threading.Thread(target=build_elsewhere, args=(cache,), daemon=True)
    started.start()
    started.join(60)
    assert not started.is_alive()
    assert not (folder / "lock").exists()
