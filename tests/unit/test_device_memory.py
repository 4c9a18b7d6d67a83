"""What is free and what was used on a device that is not the current one; CUDA has a stand-in."""

import torch

from largebatch import out_of_memory

OTHER = torch.device("cuda", 1)


def test_memory_is_that_of_the_device(monkeypatch):
    numbers = {"memory_reserved": 300, "memory_allocated": 100, "max_memory_allocated": 170}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, n=number: n * (device == OTHER))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * (device == OTHER), 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: device.index)
    assert out_of_memory.free_bytes(OTHER) == 1200
    with out_of_memory.peak_bytes(OTHER) as peak:
        assert peak() == 70
