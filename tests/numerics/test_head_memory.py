"""The memory of predicting tokens does not grow with their number times the vocabulary."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "token_objectives.py"


@pytest.mark.slow
def test_logits_of_all_tokens_never_exist():
    spec = importlib.util.spec_from_file_location("token_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    few, many = (
        benchmark.head_peak_apart(tokens, vocabulary=30_000)["extra_mib"] for tokens in (1000, 8000)
    )
    whole = 8000 * 30_000 * 4 / 2**20  # 915 MiB
    assert many < whole / 2
    assert many < few + 100
