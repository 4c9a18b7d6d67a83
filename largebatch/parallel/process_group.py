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
        UserError: A variable is missing, no number, or does not fit the others.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(name in os.environ for name in names[:2]):
        return World()
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must all be set to numbers ({error}); start ranks "
            "with torchrun, or unset what is left of them in this shell"
        ) from None
    if not 0 <= rank < size or local_rank < 0:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}: a rank is at least 0 and "
            "less than WORLD_SIZE; start ranks with torchrun, or unset the three"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={size}, but {' and '.join(missing)} is not set; start "
            "ranks with torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
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
    with _told_in_one_line():
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


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"ranks can't meet at MASTER_ADDR:MASTER_PORT={place}: "
            f"{' '.join(str(error).split())[:300]}; choose another port, or start ranks with "
            "torchrun, which finds one"
        ) from error
