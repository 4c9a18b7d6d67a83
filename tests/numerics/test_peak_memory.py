"""The memory of a step does not grow with the global batch, beyond its texts and embeddings."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_batch():
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    small, large = (memory.measure_apart(pairs, 2048)["rest_mib"] for pairs in (256, 2048))
    assert large < 1.3 * small
