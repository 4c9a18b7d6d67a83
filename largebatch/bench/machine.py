"""What a process that measures runs on."""

import platform
from pathlib import Path
from typing import Any

import torch

from largebatch.bench.peaks import Format
from largebatch.config import TrainConfig
from largebatch.train.process import Rank


def describe_machine(config: TrainConfig, rank: Rank) -> dict[str, Any]:
    """Return what the figures were measured on."""
    device = rank.device
    return {
        "device": device_name(device),
        "ranks": rank.collectives.world.size,
        "threads_per_rank": torch.get_num_threads(),
        "format": number_format(config, device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """Return what the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def number_format(config: TrainConfig, device: torch.device) -> Format:
    """Return what the encoder's products are computed in."""
    if config.hardware.precision == "bf16":
        return "bf16"
    return "tf32" if device.type == "cuda" and config.hardware.tf32 else "float32"
