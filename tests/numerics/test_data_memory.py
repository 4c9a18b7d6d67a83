"""The reader and its loader processes hold no more after many epochs than after a few.

`python benchmarks/data_memory.py` measures 50 epochs, in each way that batches are made.
"""

from pathlib import Path

import pytest
from flat_memory import growth, measure_in_new_process, write_sources

pytestmark = pytest.mark.slow

MOST_GROWTH = 0.01
"""Keeping all that was read adds 1.7% in these few epochs."""


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_stays_flat_over_epochs(tmp_path: Path, mixed: bool) -> None:
    samples = measure_in_new_process(write_sources(tmp_path), epochs=8, workers=2, mixed=mixed)
    assert sorted(samples) == ["loader 0", "loader 1", "reader"]
    for process, held in samples.items():
        assert len(held) == 8
        assert growth(held) < MOST_GROWTH, (process, held)
