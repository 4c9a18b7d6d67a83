"""What is kept for the backward pass: the work that it saves, the budget, the same on all ranks."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from dist import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.on_strategies import TOLERANCES, config_of
from numerics.reference import (
    full_batch_gradient,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from numerics.test_missing_bytes import allocated
from torch.utils.flop_counter import FlopCounterMode

from largebatch.batch import Texts
from largebatch.config import KEEPS, OptimConfig
from largebatch.errors import UserError
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import Replicas, backward
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step.gradcache import GradCache
from largebatch.step.memory import GIB, KeepPlan, graph_bytes, measured_budget

QUERIES = random_texts(20, longest=12, seed=1)
DOCUMENTS = random_texts(20, longest=30, seed=2)
BATCH = rank_batch(QUERIES, DOCUMENTS)
SOME = {"keep": "auto", "keep_gib": 1.2e-3}
"""Room for some graphs of this batch, not for all."""
OPTIONS = [{"keep": "none"}, {"keep": "all"}, SOME]


@pytest.fixture(autouse=True, scope="module")
def _built_once():
    """Build DeepSpeed's extension here, not in each of the ranks."""
    prepare(torch.device("cpu"))


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_units_are_the_work_really_done(options, packing):
    """All multiplications of a step, counted, divided by those of a forward pass."""
    # With dropout, attention on a CPU is made of plain products, whose backward passes count too.
    encoder, loss = tiny_encoder(dropout=0.1, packing=packing), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=100, **options)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        for chunk in encoder.make_chunks(Texts.from_lists([*QUERIES, *DOCUMENTS]), 100)[1]:
            encoder(chunk)
    step.accumulate(BATCH)  # measures
    with FlopCounterMode(display=False) as whole:
        report = step.accumulate(BATCH)
    contrast = 2 * 3 * 20 * 20 * 16  # products of the loss itself, at least
    units = (whole.get_total_flops() - contrast) / forward.get_total_flops()
    assert report.work.forwards == pytest.approx(units, rel=0.02)
    if options == SOME:
        assert 3.1 < report.work.forwards < 3.9
    else:
        assert report.work.forwards == {"none": 4, "all": 3}[options["keep"]]


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_graph_holds_what_was_measured(packing):
    encoder = tiny_encoder(dropout=0.1, packing=packing)
    chunk = encoder.make_chunks(BATCH.documents, 10**6)[1][0]
    graphs = []
    held = allocated(lambda: graphs.append(encoder(chunk)))
    measured = graph_bytes(encoder, chunk, list(encoder.parameters()))
    assert measured == pytest.approx(held, rel=0.02)


def test_what_graphs_hold_stays_within_the_budget():
    encoder, loss = tiny_encoder(dropout=0.1), tiny_loss(symmetric=False)
    held = []
    for options in ({"keep": "none"}, SOME, SOME | {"keep": "all"}, {"keep": "all"}):
        step = GradCache(encoder, loss, tokens_per_chunk=60, **options)
        step.accumulate(BATCH)  # measures
        plain, embedded = step.passes.embed, []

        def embed(*arguments, plain=plain, embedded=embedded):
            held.append(allocated(lambda: embedded.append(plain(*arguments))))
            return embedded.pop()

        step.passes.embed = embed
        step.accumulate(BATCH)
    nothing, some, same, everything = held
    budget = SOME["keep_gib"] * GIB
    assert everything - nothing > 1.5 * budget
    # What is left is too little for one more chunk.
    assert 0.6 * budget < some - nothing < 1.02 * budget
    assert same == some


@pytest.mark.parametrize("keep", ["auto", "all"])
def test_measuring_moves_neither_weights_nor_the_generator(keep):
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    plan, found = None, []
    for _ in range(2):
        encoder.zero_grad()
        torch.manual_seed(3)
        step = GradCache(encoder, loss, tokens_per_chunk=60, keep=keep, keep_gib=1.2e-3)
        step.memory.keep_plan = plan
        step.accumulate(BATCH)
        plan = step.memory.keep_plan
        found.append((gradients(encoder), torch.get_rng_state()))
    (measured, state), (set_before, other_state) = found
    assert relative_error(measured, set_before) == 0
    assert torch.equal(state, other_state)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    st.integers(0, 10**6),
    st.floats(0.1, 1000),
)
def test_a_plan_fills_its_budget(tokens, budget_bytes, bytes_per_token):
    keeps = KeepPlan(bytes_per_token, budget_bytes).keeps(tokens)
    sizes = [bytes_per_token * number for number in tokens]
    left = budget_bytes - sum(size for size, kept in zip(sizes, keeps, strict=True) if kept)
    assert left >= -1e-6
    assert all(kept or size > left - 1e-6 for size, kept in zip(sizes, keeps, strict=True))


def test_a_budget_means_nothing_where_nothing_is_kept():
    step = GradCache(
        tiny_encoder(), tiny_loss(symmetric=False), tokens_per_chunk=60, keep="none", keep_gib=1
    )
    assert step.accumulate(BATCH).work.forwards == 4
    assert step.memory.keep_plan is None


def test_a_decision_is_stored_and_set_again():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    first = GradCache(encoder, loss, tokens_per_chunk=60, **SOME)
    assert first.memory.keep_plan is None
    units = first.accumulate(BATCH).work.forwards
    stored = json.loads(json.dumps(first.memory.to_dict()))["keep_plan"]
    again = GradCache(encoder, loss, tokens_per_chunk=60, keep="auto", keep_gib=99)
    again.memory.keep_plan = KeepPlan(**stored)
    assert again.memory.keep_plan == first.memory.keep_plan
    assert again.accumulate(BATCH).work.forwards == units
    assert 3 < units < 4


class EqualChunks(Replicas):
    """Replicas that demand equally many passes of all ranks, and count them."""

    equal_chunks = True
    can_redo = False

    def __init__(self, *modules):
        super().__init__(modules, Collectives())
        self.passes = []

    def run(self, function, *inputs):
        self.passes.append(("forward", torch.is_grad_enabled()))
        return function(*inputs)

    @contextmanager
    def gradient_pass(self):
        with super().gradient_pass():
            yield self.backward

    def backward(self, embeddings, gradients, *, last):
        self.passes.append(("backward", len(embeddings), last))
        backward(embeddings, gradients, last=last)


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_ranks_run_equally_many_passes(options, packing):
    parts = [range(14), range(0), range(14, 20)]

    def on_rank():
        rank = torch.distributed.get_rank()
        encoder, loss = tiny_encoder(packing=packing), tiny_loss(symmetric=True)
        strategy = EqualChunks(encoder, loss)
        step = GradCache(
            encoder, loss, tokens_per_chunk=60, strategy=strategy, balance=False, **options
        )
        report = step.accumulate(
            rank_batch([QUERIES[i] for i in parts[rank]], [DOCUMENTS[i] for i in parts[rank]])
        )
        return gradients(encoder, loss), strategy.passes, report.work.num_chunks

    results = run_ranks(on_rank, 3)
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    for found, done, _ in results:
        assert relative_error(found, expected) < 1e-6
        assert done == results[0][1]
        assert [one[2] for one in done if one[0] == "backward"].count(True) == 1
        assert done[-1][-1] is not False
    assert results[0][2] > results[2][2] > results[1][2] == 0


WAYS = [{"keep": "none"}, {"keep": "all", "packing": "on"}, {"keep": "auto", "keep_gib": 4e-4}]


# test_fast_paths has each way to keep under each strategy; here is what the optimizer makes of it.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name,
            options,
            id=f"{name}-{options}",
            marks=() if options["keep"] == "auto" or name == "zero3" else pytest.mark.exhaustive,
        )
        for name in ("zero3", "fsdp", "zero1", "zero2")
        for options in WAYS
    ],
)
def test_every_strategy_keeps(name, options):
    def on_rank():
        keep_options = dict(options)
        packing = keep_options.pop("packing", "off")
        dtype = torch.float64 if name == "fsdp" else torch.float32
        encoder = tiny_encoder(packing=packing, dtype=dtype)
        loss = tiny_loss(symmetric=True, dtype=dtype)
        strategy = make_strategy(
            config_of(name),
            {"encoder": encoder, "objective": loss},
            OptimConfig(),
            Collectives(),
            torch.device("cpu"),
            "float32",
        )
        step = GradCache(
            encoder, loss, tokens_per_chunk=60, strategy=strategy, balance=False, **keep_options
        )
        rows = range(14) if torch.distributed.get_rank() == 0 else range(14, 20)
        report = step.accumulate(
            rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
        )
        norm = strategy.clip_gradients(0.0)
        strategy.step(0.1)
        moments = strategy.optimizer_state()
        moments = {n: m for n, m in moments.items() if n.startswith("exp_avg.")}
        return float(norm), moments, report.work.forwards

    results = run_ranks(on_rank, 2)
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    assert [norm for norm, *_ in results] == pytest.approx([norm] * 2, rel=TOLERANCES[name])
    # After the first step the first moment is (1 - beta1) times the gradient.
    moments = results[0][1]
    found = {name.split(".", 2)[2]: m / (1 - OptimConfig().beta1) for name, m in moments.items()}
    assert relative_error({n: found[n] for n in expected}, expected) < TOLERANCES[name]
    units = [units for *_, units in results]
    if options["keep"] == "auto":
        assert min(units) < 4
        assert max(units) > 3
    else:
        assert units == [{"none": 4, "all": 3}[options["keep"]]] * 2


def test_ranks_agree_on_cost_and_budget():
    def on_rank():
        rank = torch.distributed.get_rank()
        return KeepPlan(100.5 + rank, 1000 - rank).agreed(Collectives())

    assert run_ranks(on_rank, 2) == [KeepPlan(101.5, 999)] * 2


def test_options_that_cannot_be():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    with pytest.raises(UserError, match=f"keep='some' is not one of {', '.join(KEEPS)}"):
        GradCache(encoder, loss, keep="some")
    with pytest.raises(UserError, match="keep_gib=-1 must be at least 0"):
        GradCache(encoder, loss, keep_gib=-1)
    with pytest.raises(UserError, match="keep=auto needs keep_gib where there is no GPU"):
        GradCache(encoder, loss, keep="auto")(QUERIES, DOCUMENTS)


def test_the_budget_of_a_gpu_leaves_room(monkeypatch):
    encoder = tiny_encoder()
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    strategy = Replicas([encoder], Collectives())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000_000, 2_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100_000)
    weights = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    room = 1_200_000 - 3 * weights - 2 * 17_000
    assert room > 0
    assert measured_budget(on_gpu, 17_000, strategy) == int(0.8 * room)
    assert measured_budget(on_gpu, 10**6, strategy) == 0
