"""A collapse of the embeddings is seen by all ranks' rows together, and told once."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    embed,
    rank_batch,
    tiny_encoder,
    tiny_loss,
)
from numerics.tiny_run import tiny_config, write_data

from largebatch.config import LoggerConfig
from largebatch.errors import UserError
from largebatch.losses.geometry import alignment, effective_rank, uniformity
from largebatch.parallel.collectives import Collectives
from largebatch.step import sample as sample_module
from largebatch.step.gradcache import GradCache
from largebatch.train import trainer
from largebatch.train.collapse import look_at, why_collapsed


def look_on_rank(size):
    sample_module.SAMPLE_PAIRS = size
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ends = [0, 2, 2, NUM_PAIRS] if world_size == 3 else [0, 5, NUM_PAIRS]
    own = range(ends[rank], ends[rank + 1])
    step = GradCache(tiny_encoder(), tiny_loss(symmetric=False), tokens_per_chunk=40, balance=False)
    report = step.accumulate(rank_batch([QUERIES[i] for i in own], [DOCUMENTS[i] for i in own]))
    assert report.sample.queries_rd.untyped_storage().nbytes() == report.sample.queries_rd.nbytes
    assert len(report.sample.queries_rd) == report.sample.counts[rank]
    return look_at(report.sample, Collectives()), report.sample.counts


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_of_the_rows_of_all_ranks(ranks):
    with torch.no_grad():
        queries, documents = embed(tiny_encoder(), QUERIES), embed(tiny_encoder(), DOCUMENTS)
    expected = {
        "train/alignment": float(alignment(queries, documents)),
        "train/uniformity": float(uniformity(queries) + uniformity(documents)) / 2,
        "train/effective_rank": float(effective_rank(torch.cat([queries, documents]))),
    }
    for found, counts in run_ranks(look_on_rank, ranks, 1024):
        assert found == pytest.approx(expected, rel=1e-4)
        assert sum(counts) == NUM_PAIRS


def test_of_a_large_batch_it_takes_some_pairs():
    for _, counts in run_ranks(look_on_rank, 2, 4):
        assert counts == [2, 2]  # every fourth of 5 and of 8


def values(rank=20.0, spread=-2.0):
    return {"train/alignment": 0.1, "train/uniformity": spread, "train/effective_rank": rank}


def test_what_is_told():
    assert why_collapsed({}, most=64) is None
    assert why_collapsed(values(), most=64) is None
    assert "span 2.0 dimensions of the 64" in why_collapsed(values(rank=2.0), most=64)
    assert why_collapsed(values(rank=2.0), most=8) is None
    assert "nearly equal" in why_collapsed(values(spread=-0.001), most=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run_of(data, output, **logger):
    return tiny_config(
        data,
        output,
        logger=LoggerConfig(wandb="disabled", plots=False, **logger),
        eval=type(tiny_config(data, output).eval)(),
    )


def looked_at(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: line["train/effective_rank"] for line in lines if "train/alignment" in line
    }


def test_when_it_looks(data, tmp_path):
    run_ranks(
        trainer.train, 2, run_of(data, tmp_path / "a", geometry_every_steps=4), init_group=False
    )
    found = looked_at(tmp_path / "a")
    assert list(found) == [1, 4]
    assert all(1 < rank < 16 and math.isfinite(rank) for rank in found.values())
    options = {"geometry_every_steps": 4, "every_steps": 5}
    run_ranks(trainer.train, 1, run_of(data, tmp_path / "b", **options), init_group=False)
    assert list(looked_at(tmp_path / "b")) == [3, 5]  # step 3 is logged because it is saved
    run_ranks(
        trainer.train, 1, run_of(data, tmp_path / "c", geometry_every_steps=0), init_group=False
    )
    assert looked_at(tmp_path / "c") == {}
    with pytest.raises(UserError, match=r"logger\.geometry_every_steps=-1 must be at least 0"):
        LoggerConfig(geometry_every_steps=-1)


def collapsing_run(config):
    """Train with an encoder whose embeddings are all alike; return the warnings."""
    from largebatch.model.encoder import Encoder

    plain, told = Encoder.forward, []

    def alike(self, chunk):
        embeddings = plain(self, chunk)
        return embeddings * 1e-6 + torch.nn.functional.normalize(torch.ones_like(embeddings), dim=1)

    Encoder.forward = alike
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("largebatch.train.trainer").addHandler(handler)
    trainer.train(config)
    return told


def test_a_collapse_is_told_once(data, tmp_path):
    config = run_of(data, tmp_path / "run", geometry_every_steps=2)
    told = [
        [line for line in lines if "collapses" in line]
        for lines in run_ranks(collapsing_run, 2, config, init_group=False)
    ]
    assert [len(lines) for lines in told] == [1, 0]
    assert told[0][0].startswith("warning: step 2: the model collapses: all embeddings are nearly")
    assert np.isfinite(list(looked_at(tmp_path / "run").values())).all()
