"""Twenty steps with every fast path on give the losses of a plain loop on the same batches.

All is float32, whose relative rounding is 6e-8; a loss is a mean over sums of some hundred such
numbers, and each step starts from weights that differ by what the steps before have left, which
AdamW weighs alike for small and large gradients. The plain loop itself, in float32, strays from the
same in float64 by about 1e-6 within these steps; the fast paths, which sum in another order, may
stray 1e-4.

`python benchmarks/fast_paths.py` does the same with the quickstart.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import config_of
from numerics.reference import tiny_encoder
from numerics.tiny_run import tiny_config
from plain_training import largest_difference, losses_of_run, plain_losses

from largebatch.batch import LengthGroup
from largebatch.config import (
    BackboneConfig,
    CheckpointConfig,
    EvalConfig,
    ObjectiveConfig,
    OptimConfig,
    PoolingConfig,
    TextConfig,
)
from largebatch.model import attention
from largebatch.parallel.deepspeed_build import prepare
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer

pytestmark = pytest.mark.slow

STEPS = 20
TOLERANCE = 1e-4
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write pairs with hard negatives; some queries, documents and negatives occur again."""
    tiny_encoder()
    prepare(torch.device("cpu"))
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "shards", records_per_shard=50) as writer:
        for n in range(150):
            number = n - 1 if n % 6 == 5 else n
            query = f"query {'number ' * (n % 4)}{n if n % 7 else 7 * (n // 21)}"
            document = f"{number} is {'a long way ' * (number % 9)}from {number * number % 97}"
            negatives = [f"{n % 10} is not it"] if n % 3 == 0 else []
            writer.write(Record(query, document, negatives, "tiny", f"r{n}"))
    return folder


def config_with(data, output, *, ranks, strategy="ddp", packing="off", masks=True, **memory):
    return replace(
        tiny_config(data, output),
        global_batch=25,  # an odd number: ranks differ
        max_steps=STEPS,
        strategy=config_of(strategy),
        backbone=BackboneConfig(vocab_size=300, config=MODEL, packing=packing),
        text=TextConfig(query_max_tokens=12, document_max_tokens=40),
        pooling=PoolingConfig(mode="mean"),
        optim=OptimConfig(lr=1e-2),
        objective=ObjectiveConfig(symmetric=True, mask_duplicates=masks),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every_steps=STEPS),
        **memory,
    ), ranks


def run(config, ranks, plant=None):
    def on_rank():
        if plant is not None:
            plant()
        trainer.train(config)

    run_ranks(on_rank, ranks, init_group=False, timeout_s=40)
    return losses_of_run(Path(config.output_dir))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Return the plain loop's losses in float32 and in float64."""
    folder = tmp_path_factory.mktemp("plain")
    config, _ = config_with(data, folder, ranks=1)

    def on_rank(dtype):
        return list(plain_losses(config, folder / str(dtype), dtype=dtype))

    # In processes of their own, for training a tokenizer leaves threads that no fork survives.
    dtypes = (torch.float32, torch.float64)
    return [run_ranks(on_rank, 1, dtype, init_group=False)[0] for dtype in dtypes]


def test_the_plain_loop_rounds(plain):
    losses, exact = plain
    assert len(losses) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    assert largest_difference(losses, exact) < TOLERANCE / 10


WAYS = {
    "no fast path": {"ranks": 1, "keep": "none", "tokens_per_chunk": 100},
    "ddp": {
        "ranks": 2, "packing": "on", "keep": "auto", "keep_gib": 5e-4, "tokens_per_chunk": 200,
    },
    "ddp, chunks chosen": {
        "ranks": 2, "packing": "auto", "keep": "all", "tokens_per_chunk": "auto",
    },
    "fsdp": {
        "ranks": 2, "strategy": "fsdp", "packing": "on", "keep": "all", "tokens_per_chunk": 400,
    },
    "zero2": {
        "ranks": 2, "strategy": "zero2", "packing": "on", "keep": "auto", "keep_gib": 5e-4,
        "tokens_per_chunk": 200,
    },
    "zero3": {
        "ranks": 2, "strategy": "zero3", "packing": "on", "keep": "auto", "keep_gib": 5e-4,
        "tokens_per_chunk": 200,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_the_plain_loop(data, plain, tmp_path, way):
    losses = run(*config_with(data, tmp_path / "run", **WAYS[way]))
    assert largest_difference(losses, plain[0]) < TOLERANCE


def let_packed_texts_see_each_other():
    packed_attention = attention.packed_attention

    def attend(*arguments, packing=None, **options):
        if packing is not None:
            packing = packing._replace(groups=(LengthGroup(1, packing.position_ids.numel()),))
        return packed_attention(*arguments, packing=packing, **options)

    attention.packed_attention = attend


@pytest.mark.parametrize(
    ("changes", "plant"),
    [({"masks": False}, None), ({}, let_packed_texts_see_each_other)],
    ids=["duplicates count", "packed texts see each other"],
)
def test_other_losses_are_seen(data, plain, tmp_path, changes, plant):
    losses = run(*config_with(data, tmp_path / "run", **WAYS["ddp"], **changes), plant)
    assert largest_difference(losses, plain[0]) > 10 * TOLERANCE
