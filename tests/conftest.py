"""What holds for every test: one thread, no network, and a GPU only for tests that ask for it."""

import logging
import os
import signal
from collections.abc import Iterator

# Before torch is imported: a thread pool in this process would not survive the forks of run_ranks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import pytest

# A shell that starts the tests in the background, or nohup, ignores these for them and for all that
# they start.
for ignored in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(
            ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make test-exhaustive` asks with."""
    parser.addoption("--exhaustive", action="store_true", help="all combinations, not all pairs")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless only GPU tests run, so that all others see the same machine everywhere.

    (A process that ever used autograd with a GPU in sight cannot fork ranks that use autograd.)
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the combinations that are too many for each run, unless they are asked for."""
    if config.option.exhaustive or "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where GPUs are hidden or absent, but for those that stand in on the CPU."""
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        import torch

        if item.config.option.markexpr != "gpu":
            if marker.kwargs.get("stand_in"):
                return
            pytest.skip("GPU tests run alone: pytest -m gpu")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Take away the log handlers that a test leaves (Hydra's `--info` does): they hold its stdout,
    which is closed by then, and would fail whichever later test logs a line. Set levels back: a
    rank other than 0 logs errors only.
    """
    root, own = logging.getLogger(), logging.getLogger("largebatch")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    own.setLevel(levels[1])
