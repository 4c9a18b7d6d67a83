"""run_ranks: results in order, failures with their trace, and no rank that outlives it."""

import gc
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist import run_ranks

from largebatch.errors import UserError


class Point(NamedTuple):
    x: torch.Tensor
    y: int


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_form_a_group_and_results_come_in_rank_order(world_size: int) -> None:
    def sum_of_ranks(factor: float) -> tuple[int, torch.Tensor]:
        total = torch.tensor([dist.get_rank() * factor], dtype=torch.float64)
        dist.all_reduce(total)
        return dist.get_rank(), total

    results = run_ranks(sum_of_ranks, world_size, 0.1)
    assert [rank for rank, _ in results] == list(range(world_size))
    for _, total in results:
        np.testing.assert_allclose(total, [0.1 * sum(range(world_size))])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_backward_works_after_threads_were_used_in_the_parent() -> None:
    weights = torch.randn(256, 256, requires_grad=True)
    (weights @ weights).sum().backward()

    def gradient() -> torch.Tensor | None:
        weights.grad = None
        (weights @ weights).sum().backward()
        return weights.grad

    assert weights.grad is not None
    for grad in run_ranks(gradient, 2):
        np.testing.assert_allclose(grad, weights.grad.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_ranks_see_what_torchrun_sets_and_one_thread() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")

    def look() -> tuple[list[str], int, bool]:
        return [os.environ[name] for name in names], torch.get_num_threads(), dist.is_initialized()

    assert run_ranks(look, 2, init_group=False) == [
        (["0", "0", "2", "127.0.0.1"], 1, False),
        (["1", "1", "2", "127.0.0.1"], 1, False),
    ]
    assert "RANK" not in os.environ


def test_a_function_may_start_the_group_itself() -> None:
    def start() -> int:
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return int(total)

    assert run_ranks(start, 2, init_group=False) == [2, 2]


def test_large_and_nested_results_come_back() -> None:
    def build() -> dict[str, object]:
        return {
            "large": np.arange(3_000_000),
            "point": Point(torch.ones(2, dtype=torch.bfloat16), 3),
            "list": [torch.tensor(True), (1, "a")],
        }

    for result in run_ranks(build, 2, init_group=False):
        np.testing.assert_array_equal(result["large"], np.arange(3_000_000))
        assert result["point"].y == 3
        assert result["point"].x.dtype == np.float32
        assert result["list"] == [np.array(True), (1, "a")]


def test_the_first_failure_is_raised_with_its_trace_and_the_others_do_not_hang() -> None:
    def fail_on_rank_1() -> None:
        if dist.get_rank() == 1:
            raise UserError("option=3 must be 4")
        dist.barrier()
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(UserError, match="option=3 must be 4") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert time.monotonic() - start < 50  # of the minute that rank 0 would sleep
    assert caught.value.__notes__[0].startswith("rank 1: Traceback")
    assert "in fail_on_rank_1" in caught.value.__notes__[0]


def test_an_exception_that_does_not_pickle_keeps_its_text() -> None:
    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("some words")

    with pytest.raises(RuntimeError, match="LocalError: some words"):
        run_ranks(fail, 1)


def test_a_result_that_does_not_pickle_fails() -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        run_ranks(lambda: lambda: None, 1)


def test_a_killed_rank_fails() -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        run_ranks(die, 2)


def test_a_hanging_rank_is_ended_with_its_children_and_the_place_is_named(tmp_path: Path) -> None:
    def hang_here() -> None:
        if dist.get_rank() == 1:
            child = subprocess.Popen(["sleep", "60"])
            (tmp_path / "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(60)

    with pytest.raises(TimeoutError, match=r"ranks \[1\] not done after 1 s") as caught:
        run_ranks(hang_here, 2, timeout_s=1)
    assert "in hang_here" in str(caught.value)
    rank_pid, child_pid = map(int, (tmp_path / "pids").read_text().split())
    assert gone(rank_pid)
    deadline = time.monotonic() + 50  # the child is reaped by init, not by us
    while not gone(child_pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(child_pid) or "Z" in Path(f"/proc/{child_pid}/stat").read_text().split()[2]


def test_ranks_leave_the_parents_garbage_alone() -> None:
    """A store in it would wait for its thread, which did not survive the fork."""
    gc.disable()
    try:
        garbage: list[object] = [dist.TCPStore("127.0.0.1", 0, is_master=True)]
        garbage.append(garbage)
        del garbage
        run_ranks(gc.collect, 2, timeout_s=10)
    finally:
        gc.enable()
