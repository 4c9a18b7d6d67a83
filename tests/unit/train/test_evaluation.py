"""Scores inside a run."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet
from largebatch.parallel.collectives import Collectives
from largebatch.train.evaluation import Evaluation


@contextmanager
def too_large():
    """Stand in for the whole weights of a sharded model."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    yield


def test_memory_that_runs_out_is_told_in_one_line():
    strategy = SimpleNamespace(whole=too_large, collectives=Collectives())
    tiny = RetrievalSet("tiny", {"d": "text"}, {"q": "text"}, {"q": {"d": 1}})
    with pytest.raises(UserError, match=r"scoring tiny ran out of memory.*eval\.batch_tokens=64"):
        Evaluation(strategy.collectives, strategy.whole, 64).score(tiny)
