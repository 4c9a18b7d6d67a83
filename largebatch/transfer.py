"""Between host and device: copies that the host doesn't wait for, and the wait where it must."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device; on the CPU they share memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # Only from pinned memory does a copy not make the host wait.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Return when all that was given to a device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
