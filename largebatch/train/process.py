"""A process of a run: its device, its threads, and its connection to the other ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from largebatch.config import TrainConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.process_group import (
    choose_device,
    process_group,
    world_from_environment,
)
from largebatch.train.memory import bound_kernel_cache
from largebatch.world import num_cores


class Rank(NamedTuple):
    """This process among those of a run."""

    device: torch.device
    collectives: Collectives


@contextmanager
def connected(config: TrainConfig) -> Iterator[Rank]:
    """Make this process ready, and connect it to the other ranks inside.

    Raises:
        UserError: There is no such device, or the launcher's environment is incomplete.
    """
    world = world_from_environment()
    device = choose_device(config.hardware.device, world)
    bound_kernel_cache()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.hardware.tf32 else "highest")
    torch.set_num_threads(_num_threads(config, world.size))
    with process_group(world, device, config.strategy):
        collectives = Collectives()
        # Wait until all are connected: if a rank failed before, the backends of the others would
        # print warnings of their own beside its line.
        collectives.highest(0)
        yield Rank(device, collectives)


def _num_threads(config: TrainConfig, world_size: int) -> int:
    if config.hardware.threads:
        return config.hardware.threads
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, num_cores() // ranks_here)
