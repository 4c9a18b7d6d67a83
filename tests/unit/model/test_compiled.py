"""Compiled and checkpointed layers: the same gradients, few graphs, less memory."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    embed,
    full_batch_gradient,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from torch import nn
from torch._dynamo.utils import counters

from largebatch.batch import Texts
from largebatch.config import OptimConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.model import compiled
from largebatch.model.compiled import check_compiler, compile_layers, is_compiled, plain_shape
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.make import make_strategy
from largebatch.step.dropout import RandomState
from largebatch.step.gradcache import GradCache
from largebatch.step.memory import graph_bytes

# torch warns of itself while it compiles, and hides that, but not where warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

QUERIES = random_texts(12, longest=12, seed=1)
DOCUMENTS = random_texts(12, longest=30, seed=2)


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a C++ compiler; the fixture returns how many graphs there are."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def chunks_of(encoder, *, batches=10):
    """Return the chunks of batches whose texts and budgets are all different."""
    generator = np.random.default_rng(0)
    chunks = []
    for seed in range(batches):
        texts = random_texts(int(generator.integers(1, 30)), longest=40, seed=seed)
        budget = int(generator.integers(40, 300))
        chunks += encoder.make_chunks(Texts.from_lists(texts), budget)[1]
    return chunks


@contextmanager
def saved_bytes(encoder):
    """Count the bytes that graphs hold; weights don't count."""
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    found = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield found


def total(found):
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    ("pooling", "dropout", "checkpoint_layers"),
    [("mean", 0.0, False), ("cls", 0.2, False), ("mean", 0.2, True)],
)
def test_two_graphs_serve_all_shapes(graphs, pooling, dropout, checkpoint_layers):
    options = {"dropout": dropout, "packing": "off", "pooling": pooling}
    encoder = tiny_encoder(compile=True, checkpoint_layers=checkpoint_layers, **options)
    plain = tiny_encoder(**options)
    plain._has_one_token_layer = False  # as in the compiled one; its dropout masks are larger
    # First, when nothing is compiled yet, those that a graph would be special for.
    special = [[[7] * length] * n for n, length in ((9, 9), (1, 9), (9, 1), (1, 1), (2, 2))]
    chunks = [encoder.make_chunks(Texts.from_lists(texts), 10**6)[1][0] for texts in special]
    chunks += chunks_of(encoder)
    shapes = {chunk.input_ids.shape for chunk in chunks}
    assert len(shapes) > 30
    assert not all(chunk.padded for chunk in chunks)
    for chunk in chunks:
        state = RandomState.of(encoder.device)
        with torch.no_grad():
            first = encoder(chunk)
        state.restore()
        again = encoder(chunk)
        state.restore()
        expected = plain(plain_shape(chunk, pad_id=plain.pad_id))[: len(chunk.input_ids)]
        torch.testing.assert_close(first, again.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
        for embeddings in (again, expected):
            embeddings.backward(torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
    assert relative_error(gradients(encoder), gradients(plain)) < 1e-6
    # Both layers and all shapes: one for the first pass, one with a graph.
    assert graphs() == 2
    encoder.eval()
    for chunk in chunks:
        with torch.no_grad():
            encoder(chunk)
    assert graphs() == 3


@pytest.mark.slow
def test_inductor_draws_the_masks_that_are_drawn_without_it():
    torch.compiler.reset()
    encoder, plain = tiny_encoder(dropout=0.2, compile=True), tiny_encoder(dropout=0.2)
    plain.packing = "off"
    for chunk in chunks_of(plain, batches=3):
        state = RandomState.of(encoder.device)
        with torch.no_grad():
            first = encoder(chunk)
        state.restore()
        again = encoder(chunk)
        torch.testing.assert_close(first, again.detach(), rtol=0, atol=1e-12)
        state.restore()
        expected = plain(plain_shape(chunk, pad_id=plain.pad_id))[: len(chunk.input_ids)]
        for embeddings in (again, expected):
            embeddings.backward(torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
    assert relative_error(gradients(encoder), gradients(plain)) < 1e-6


@pytest.mark.parametrize("keep", ["none", "all", "auto"])
@pytest.mark.parametrize(
    ("options", "gib"), [({"compile": True}, 3e-4), ({"checkpoint_layers": True}, 1e-4)], ids=str
)
def test_a_step_has_the_gradient_of_the_full_batch(graphs, keep, options, gib):
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    encoder, loss = tiny_encoder(**options), tiny_loss(symmetric=True)
    step = GradCache(
        encoder, loss, tokens_per_chunk=60, keep=keep, keep_gib=gib if keep == "auto" else None
    )
    report = step.accumulate(rank_batch(QUERIES, DOCUMENTS))
    assert relative_error(gradients(encoder, loss), expected) < 1e-6
    assert report.work.num_chunks > 3
    if keep == "auto":
        assert 3 < report.work.forwards - encoder.extra_forwards < 4


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param("ddp", "compile", marks=pytest.mark.exhaustive),  # as in test_fast_paths
        ("fsdp", "compile"),
        pytest.param("zero2", "compile", marks=pytest.mark.exhaustive),
        ("ddp", "checkpoint_layers"),
        ("fsdp", "checkpoint_layers"),
        ("zero2", "checkpoint_layers"),
        ("zero3", "checkpoint_layers"),
    ],
)
def test_strategies(monkeypatch, name, option):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    dtype = torch.float32 if name.startswith("zero") else torch.float64

    def on_rank():
        rank = torch.distributed.get_rank()
        encoder, loss = (
            tiny_encoder(dtype=dtype, **{option: True}),
            tiny_loss(symmetric=True, dtype=dtype),
        )
        config = (
            StrategyConfig(
                name="deepspeed",
                zero_stage=int(name[-1]),
                config={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            )
            if name.startswith("zero")
            else StrategyConfig(name=name)
        )
        strategy = make_strategy(
            config,
            {"encoder": encoder, "objective": loss},
            OptimConfig(),
            Collectives(),
            torch.device("cpu"),
            "float32",
        )
        rows = range(9) if rank == 0 else range(9, 12)
        step = GradCache(encoder, loss, tokens_per_chunk=60, strategy=strategy, balance=False)
        step([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
        strategy.clip_gradients(0.0)
        strategy.step(0.0)
        with strategy.whole() as whole:
            embeddings = embed(whole, QUERIES[:2]).detach()
        return strategy.optimizer_state(), sorted(strategy.weights()), embeddings

    results = run_ranks(on_rank, 2)
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=True)
    _, expected = full_batch_gradient(encoder, loss, QUERIES, DOCUMENTS)
    state, names, _ = results[0]
    # After the first step the first moment is (1 - beta1) times the gradient.
    found = {
        name.split(".", 2)[2]: moment / (1 - OptimConfig().beta1)
        for name, moment in state.items()
        if name.startswith("exp_avg.")
    }
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    assert relative_error({name: found[name] for name in expected}, expected) < tolerance
    assert {f"encoder.{name}" for name in encoder.state_dict()} <= set(names)
    for _, _, embeddings in results:
        np.testing.assert_allclose(embeddings, embed(encoder, QUERIES[:2]).detach(), atol=1e-5)


def test_zero_3_is_refused(graphs):
    encoder = tiny_encoder(dtype=torch.float32, compile=True)
    loss = tiny_loss(symmetric=True, dtype=torch.float32)
    config = StrategyConfig(name="deepspeed", zero_stage=3)
    says = r"backbone\.compile=true can't be used with strategy\.zero_stage=3; use .*strategy=fsdp"
    with pytest.raises(UserError, match=says):
        make_strategy(
            config,
            {"encoder": encoder, "objective": loss},
            OptimConfig(),
            Collectives(),
            torch.device("cpu"),
            "float32",
        )


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_layers_hold_their_inputs_only(packing, pooling, dropout):
    options = {"dropout": dropout, "packing": packing, "pooling": pooling}
    held, found = [], []
    for checkpoint_layers in (False, True):
        encoder = tiny_encoder(checkpoint_layers=checkpoint_layers, **options)
        (chunk,) = encoder.make_chunks(Texts.from_lists(DOCUMENTS), 10**6)[1]
        assert (chunk.packing is None) == (packing == "off")
        torch.manual_seed(1)
        with saved_bytes(encoder) as storages:
            embeddings = encoder(chunk)
        held.append(total(storages))
        # Others draw in between, as when many graphs are kept.
        torch.rand(7)
        embeddings.backward(torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings))
        found.append(gradients(encoder))
    assert relative_error(found[1], found[0]) < 1e-9
    # Weights' own share is left out; what is left beside the layers is embeddings and pooling.
    assert held[1] < 0.5 * held[0]


def test_checkpointed_layers_cost_a_forward_pass_more():
    assert tiny_encoder().extra_forwards == 0
    encoder = tiny_encoder(checkpoint_layers=True)
    assert encoder.extra_forwards == 1
    (chunk,) = encoder.make_chunks(Texts.from_lists(DOCUMENTS), 10**6)[1]
    calls = []
    for layer in encoder.backbone.encoder.layer:
        layer.intermediate.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        encoder(chunk)
    assert len(calls) == 2
    encoder(chunk).sum().backward()
    assert len(calls) == 2 + 4


def test_costs_of_compiled_layers_are_measured(graphs):
    texts = Texts.from_lists(DOCUMENTS)
    costs = {}
    for name, options in {
        "plain": {},
        "compiled": {"compile": True},
        "checkpointed": {"checkpoint_layers": True},
    }.items():
        encoder = tiny_encoder(packing="off", **options)
        (chunk,) = encoder.make_chunks(texts, 10**6)[1]
        parameters = list(encoder.parameters())
        costs[name] = graph_bytes(encoder, chunk, parameters) / chunk.num_tokens
        with saved_bytes(encoder) as storages:
            embeddings = encoder(chunk)
        assert costs[name] == total(storages) / chunk.num_tokens
        del embeddings
    hidden = 8 * 16  # bytes of a token's hidden state
    assert costs["checkpointed"] > 2 * hidden
    assert costs["compiled"] > costs["checkpointed"]
    assert costs["plain"] > costs["checkpointed"]


def test_names_and_copies_know_nothing_of_it(graphs):
    encoder = tiny_encoder(compile=True, packing="on")
    assert is_compiled(encoder)
    assert not encoder.can_pack
    assert encoder.state_dict().keys() == tiny_encoder().state_dict().keys()
    copied = copy.deepcopy(encoder)
    assert not is_compiled(copied)
    assert copied.can_pack


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"'no-such-compiler' is not there: install g\+\+"):
        check_compiler()
    with pytest.raises(UserError, match=r"backbone\.compile needs a C\+\+ compiler"):
        tiny_encoder(compile=True)


def test_backbones_that_cannot_be():
    with pytest.raises(UserError, match=r"backbone\.compile: Linear has no list of layers"):
        compile_layers(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"backbone\.checkpoint_layers: Linear has no activation"):
        compiled.checkpoint_layers(nn.Linear(2, 2))
