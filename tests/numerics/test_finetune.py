"""Fine-tuning on every strategy: frozen parts, adapters, and a learning rate for each layer."""

import re

import numpy as np
import pytest
import torch
from all_pairs import combined
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, config_of, whole_gradients
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    gradients,
    plain_infonce,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.batch import Texts
from largebatch.config import LoraConfig, OptimConfig
from largebatch.model.freeze import freeze
from largebatch.model.lora import add_adapters
from largebatch.parallel import optimizer as optimizer_module
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step.dropout import RandomState
from largebatch.step.gradcache import GradCache
from largebatch.world import part_of_rank

CPU = torch.device("cpu")
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
KINDS = {
    "positions": ["positions"],
    "first layer": ["embeddings", "layers:1"],
    "last layer": ["encoder.layer.1"],
    "vectors": ["*.bias", "*.LayerNorm.weight"],
    "lora": None,
}


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    import peft  # noqa: F401

    prepare(CPU)


def encoder_of(kind, *, dtype=torch.float64, dropout=0.0, **settings):
    """Return an encoder with frozen parts, or with adapters that are not 0."""
    encoder = tiny_encoder(dtype=dtype, **settings)
    if KINDS[kind] is not None:
        freeze(encoder.backbone, KINDS[kind])
        return encoder
    torch.manual_seed(3)
    add_adapters(encoder.backbone, LoraConfig(r=3, alpha=6.0, dropout=dropout))
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if ".lora_" in name:
                # In float64 whatever the weight's type: torch draws other numbers for others.
                weight.copy_(0.3 * torch.randn(weight.shape, dtype=torch.float64))
    return encoder.to(dtype).train()


def uneven(rank, size):
    """Rank 0 has two pairs, the others share the rest."""
    if size == 1:
        return range(NUM_PAIRS)
    rest = part_of_rank(NUM_PAIRS - 2, max(rank - 1, 0), size - 1)
    return range(2) if rank == 0 else range(rest.start + 2, rest.stop + 2)


def gradient_on_rank(kind, name, keep, packing):
    dtype = torch.float32 if name.startswith("zero") else torch.float64
    encoder = encoder_of(kind, dtype=dtype, packing=packing)
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    loss = tiny_loss(symmetric=True, dtype=dtype)
    collectives = Collectives()
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(),
        collectives,
        CPU,
        "float32",
    )
    step = GradCache(
        encoder, loss, tokens_per_chunk=40, keep=keep, strategy=strategy, balance=False
    )
    rows = uneven(collectives.world.rank, collectives.world.size)
    report = step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    assert all(p.grad is None for n, p in encoder.named_parameters() if n in frozen)
    found = whole_gradients(strategy)
    assert set(strategy.trained_shapes()) == {
        f"objective.{n}" if n.startswith("temperature") else f"encoder.{n}" for n in found
    }
    return float(report.loss), found, report.work.num_chunks


@combined(
    kind=list(KINDS),
    name=list(STRATEGIES),
    ranks=[2, 1, 3],
    keep=["none", "all"],
    packing=["off", "on"],
)
def test_the_gradient_is_that_of_plain_autograd(kind, name, ranks, keep, packing):
    loss, expected = full_batch_gradient(
        encoder_of(kind), tiny_loss(symmetric=True), QUERIES, DOCUMENTS
    )
    for value, found, num_chunks in run_ranks(gradient_on_rank, ranks, kind, name, keep, packing):
        assert value == pytest.approx(float(loss), rel=1e-5)
        assert relative_error(found, expected) < TOLERANCES[name]
        assert num_chunks > 1


def dropout_step(world_size, keep, packing):
    """Return the cached gradient of adapters with dropout, and the random state before it."""
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    encoder, loss = encoder_of("lora", dropout=0.4, packing=packing), tiny_loss(symmetric=False)
    rows = uneven(rank, world_size)
    torch.manual_seed(100 + rank)
    state = torch.get_rng_state()
    step = GradCache(encoder, loss, tokens_per_chunk=60, keep=keep, balance=False)
    step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    return gradients(encoder, loss), state.numpy()


def one_graph(results, packing):
    """Return the gradient of one graph over the same ranks, chunks and random states."""
    encoder, loss = encoder_of("lora", dropout=0.4, packing=packing), tiny_loss(symmetric=False)
    queries, documents = [], []
    for rank, (_, state) in enumerate(results):
        rows = uneven(rank, len(results))
        texts = Texts.from_lists([QUERIES[i] for i in rows] + [DOCUMENTS[i] for i in rows])
        plan, chunks = encoder.make_chunks(texts, 60)
        torch.set_rng_state(torch.from_numpy(np.array(state)))
        embeddings = torch.cat([encoder(chunk) for chunk in chunks])
        embeddings = embeddings[torch.from_numpy(np.argsort(np.concatenate(plan)))]
        queries.append(embeddings[: len(rows)])
        documents.append(embeddings[len(rows) :])
    plain_infonce(
        torch.cat(queries), torch.cat(documents), loss.temperature(), symmetric=False
    ).backward()
    return gradients(encoder, loss)


@combined(ranks=[1, 2, 3], keep=["none", "all"], packing=["off", "on"])
def test_the_dropout_of_adapters_is_replayed(ranks, keep, packing):
    arguments = (ranks, keep, packing)
    results = (
        [dropout_step(*arguments)] if ranks == 1 else run_ranks(dropout_step, ranks, *arguments)
    )
    expected = one_graph(results, packing)
    for found, _ in results:
        assert relative_error(found, expected) < 1e-6
    _, without = full_batch_gradient(
        encoder_of("lora"), tiny_loss(symmetric=False), QUERIES, DOCUMENTS
    )
    assert relative_error(results[0][0], without) > 0.1  # dropout was on


def test_dropout_that_is_not_replayed_is_seen(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(RandomState, "replayed", lambda self: nullcontext())
    result = dropout_step(1, "none", "off")
    assert relative_error(result[0], one_graph([result], "off")) > 1e-3


DECAY, RATE, STEPS = 0.5, 1e-2, 3


def steps_on_rank(kind, name):
    """Take steps; return the weights before and after, the optimizer's state and all names."""
    dtype = torch.float32 if name.startswith("zero") else torch.float64
    encoder, loss = encoder_of(kind, dtype=dtype), tiny_loss(symmetric=True, dtype=dtype)
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(layer_decay=DECAY, weight_decay=0.1),
        Collectives(),
        CPU,
        "float32",
    )
    before = {n: w.clone() for n, w in strategy.weights().items()}
    step = GradCache(encoder, loss, tokens_per_chunk=40, strategy=strategy, balance=False)
    rows = uneven(strategy.collectives.world.rank, strategy.collectives.world.size)
    for _ in range(STEPS):
        step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
        strategy.clip_gradients(0.0)
        strategy.step(RATE)
        strategy.zero_grad()
    return before, strategy.weights(), list(strategy.optimizer_state())


def depth(name):
    """Return how many layers lie above a weight, that of the objective not counted."""
    if "embeddings" in name:
        return 3
    layer = re.search(r"encoder\.layer\.(\d)", name)
    return 0 if layer is None else 2 - int(layer[1])


def plain_steps(kind):
    """Return the weights after as many steps of AdamW, written out, over the whole batch."""
    encoder, loss = encoder_of(kind), tiny_loss(symmetric=True)
    named = {f"encoder.{n}": p for n, p in encoder.named_parameters() if p.requires_grad}
    named |= {f"objective.{n}": p for n, p in loss.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    options = OptimConfig()
    for t in range(1, STEPS + 1):
        _, found = full_batch_gradient(encoder, loss, QUERIES, DOCUMENTS)
        with torch.no_grad():
            for name, weight in named.items():
                gradient = found[name.partition(".")[2]]
                rate = RATE * DECAY ** depth(name)
                weight *= 1 - rate * (0.1 if weight.ndim >= 2 else 0.0)
                first[name].lerp_(gradient, 1 - options.beta1)
                second[name].lerp_(gradient.square(), 1 - options.beta2)
                mean = first[name] / (1 - options.beta1**t)
                root = (second[name] / (1 - options.beta2**t)).sqrt()
                weight -= rate * mean / (root + options.eps)
    return {name: weight.detach().numpy() for name, weight in named.items()}


@pytest.fixture(scope="module")
def plain():
    return {kind: plain_steps(kind) for kind in ("first layer", "positions", "lora")}


def assert_as_plain(kind, name, expected):
    before, after, state = run_ranks(steps_on_rank, 2, kind, name)[0]
    tolerance = 1e-3 if name.startswith("zero") else 1e-6
    keys = {f"{key}.{n}" for key in ("exp_avg", "exp_avg_sq", "step") for n in expected}
    assert set(state) == keys  # nothing of frozen weights
    for weight, value in after.items():
        if weight.endswith("key.bias") and name.startswith("zero"):
            continue  # its gradient is 0 but for rounding, which Adam makes as large as any
        if weight in expected:
            np.testing.assert_allclose(
                value - before[weight],
                expected[weight] - before[weight],
                atol=tolerance * RATE,
                err_msg=weight,
            )
        else:
            np.testing.assert_array_equal(value, before[weight], err_msg=weight)
    assert len(after) > len(expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("positions", "ddp"),
        ("positions", "zero3"),
        ("first layer", "fsdp"),
        ("first layer", "zero2"),
        ("lora", "ddp"),
        ("lora", "fsdp"),
        ("lora", "zero2"),
        ("lora", "zero3"),
    ],
)
def test_steps_with_a_rate_for_each_layer(plain, kind, name):
    assert_as_plain(kind, name, plain[kind])


def test_layers_counted_from_the_wrong_end_are_seen(plain, monkeypatch):
    right = optimizer_module.rate_scales

    def upside_down(module, decay):
        return {weight: decay**3 / scale for weight, scale in right(module, decay).items()}

    monkeypatch.setattr(optimizer_module, "rate_scales", upside_down)
    with pytest.raises(AssertionError):
        assert_as_plain("positions", "ddp", plain["positions"])


@pytest.mark.parametrize("kind", ["lora", "first layer"])
@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "cls", "packing": "on"},  # whose last layer runs at one token of each text
        {"pooling": "last", "packing": "off"},
        {"checkpoint_layers": True, "packing": "off"},
        {"checkpoint_layers": True, "packing": "on"},
    ],
    ids=str,
)
def test_the_gradient_where_layers_run_otherwise(kind, settings):
    pooling = settings.get("pooling", "mean")
    plain = encoder_of(kind, pooling=pooling)
    plain._has_one_token_layer = False
    loss, expected = full_batch_gradient(plain, tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    for keep in ("none", "all"):
        encoder, objective = encoder_of(kind, **settings), tiny_loss(symmetric=True)
        step = GradCache(encoder, objective, tokens_per_chunk=40, keep=keep)
        value = step(QUERIES, DOCUMENTS)
        assert float(value) == pytest.approx(float(loss))
        assert relative_error(gradients(encoder, objective), expected) < 1e-6
