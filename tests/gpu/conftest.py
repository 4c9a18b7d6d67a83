"""GPU tests run alone, `pytest -m gpu`. Those that stand in run on the CPU in all other runs."""

import pytest
import torch


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU; the CPU where a test stands in for itself."""
    return (
        torch.device("cuda", 0) if request.config.option.markexpr == "gpu" else torch.device("cpu")
    )
