"""The process group: from a launcher's environment to ranks that can reach each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from largebatch.config import StrategyConfig
from largebatch.errors import UserError
from largebatch.world import World


def world_from_environment() -> World:
    """Read rank and world size that torchrun or deepspeed set; one process where neither did.

    Raises:
        UserError: A variable is missing or no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(name in os.environ for name in names[:2]):
        return World()
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must all be set to numbers ({error}); start ranks "
            "with torchrun"
        ) from None
    return World(rank=rank, size=size, local_rank=local_rank)


def choose_device(name: str, world: World) -> torch.device:
    """Return this rank's device.

    Args:
        name: auto, cpu or cuda.
        world: Its local rank is the index of the GPU.

    Raises:
        UserError: CUDA is asked for where there is none, or there are more ranks than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("hardware.device=cuda, but torch sees no GPU; use hardware.device=cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {world.rank} is number {world.local_rank} on its machine, which has "
            f"{torch.cuda.device_count()} GPUs; start one rank per GPU"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, config: StrategyConfig) -> Iterator[None]:
    """Connect the ranks inside the context.

    With one process there is nothing to connect; fsdp and deepspeed get a group of one.
    """
    if world.size == 1 and config.name == "ddp":
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        # On CPU tensors travels what hosts tell each other: then none waits for its device.
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=world.rank,
        world_size=world.size,
        store=dist.HashStore() if world.size == 1 else None,  # type: ignore[attr-defined]
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    yield
    # After an error the group is left as it is: taking it down would wait for ranks that are gone.
    dist.destroy_process_group()
