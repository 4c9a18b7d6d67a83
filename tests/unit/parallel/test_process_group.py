"""The process group: what a launcher sets, devices, and the end of a group."""

import socket

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks

from largebatch.config import StrategyConfig
from largebatch.errors import UserError
from largebatch.parallel.process_group import choose_device, process_group, world_from_environment
from largebatch.world import World

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")  # some other tool's
    assert world_from_environment() == World(rank=0, size=1, local_rank=0)


def test_reads_what_torchrun_sets(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name, value in zip(NAMES, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=5, size=8, local_rank=1)
    assert not world_from_environment().is_main


@pytest.mark.parametrize("values", [("0", "2", None), ("0", None, "0"), ("0", "two", "0")])
def test_names_what_a_launcher_left_out(monkeypatch, values):
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"must all be set to numbers .*start ranks with torchrun"):
        world_from_environment()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR and MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "less than WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "at least 0"),
    ],
)
def test_what_another_launcher_left_is_told_with_the_cure(monkeypatch, values, told):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{told}.*torchrun, or unset"):
        world_from_environment()


def test_a_port_that_is_taken_is_told(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        group = process_group(World(0, 2), torch.device("cpu"), StrategyConfig())
        with pytest.raises(UserError, match="choose another port"), group:
            pass


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_the_cpu_where_there_is_no_gpu(name):
    assert choose_device(name, World()) == torch.device("cpu")


def test_cuda_where_there_is_none():
    with pytest.raises(UserError, match=r"torch sees no GPU; use hardware\.device=cpu"):
        choose_device("cuda", World())


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", World(rank=5, size=8, local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="rank 6 is number 2 on its machine, which has 2 GPUs"):
        choose_device("auto", World(rank=6, size=8, local_rank=2))


def connect():
    world = world_from_environment()
    with process_group(world, torch.device("cpu"), StrategyConfig(timeout_s=30)):
        total = torch.tensor([float(world.rank + 1)])
        dist.all_reduce(total)
        inside = dist.is_initialized(), dist.get_backend()
    return float(total), inside, dist.is_initialized()


def test_connects_ranks_and_takes_the_group_down():
    assert run_ranks(connect, 2, init_group=False) == [(3.0, (True, "gloo"), False)] * 2


def test_one_process_needs_no_group():
    with process_group(World(), torch.device("cpu"), StrategyConfig()):
        assert not dist.is_initialized()


def test_a_group_of_one_for_strategies_that_need_it():
    with process_group(World(), torch.device("cpu"), StrategyConfig(name="fsdp")):
        assert dist.get_world_size() == 1
        total = torch.tensor([2.0])
        dist.all_reduce(total)
        assert total.tolist() == [2.0]
    assert not dist.is_initialized()


def fail_alone():
    world = world_from_environment()
    with process_group(world, torch.device("cpu"), StrategyConfig(timeout_s=20)):
        if world.rank == 1:
            raise UserError("rank 1 fails")
        dist.barrier()


def test_an_error_on_one_rank_comes_through_at_once():
    with pytest.raises(UserError, match="rank 1 fails"):
        run_ranks(fail_alone, 2, init_group=False, timeout_s=15)
