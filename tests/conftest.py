"""What holds for every test: one thread, no network, and a GPU only for tests that ask for it."""

import os

# Before torch is imported: a thread pool in this process would not survive the forks of run_ranks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless only GPU tests run, so that all others see the same machine everywhere.

    (A process that ever used autograd with a GPU in sight cannot fork ranks that use autograd.)
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where GPUs are hidden or absent."""
    if item.get_closest_marker("gpu"):
        import torch

        if item.config.option.markexpr != "gpu":
            pytest.skip("GPU tests run alone: pytest -m gpu")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
