"""What is kept for the backward pass: the work that it saves, the budget, the same on all ranks."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from dist import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from largebatch.step.keep import (
    LEVELS,
    LevelCost,
    _Counter,
    _is_kept,
    embed_keeping,
    measure_levels,
    time_levels,
)
from numerics.reference import (
    full_batch_gradient,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.batch import Texts
from largebatch.config import OptimConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import backward, one_reduction
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step import keep as keep_module
from largebatch.step import passes
from largebatch.step.gradcache import GradCache
from largebatch.step.memory import KeepPlan, measured_budget

QUERIES = random_texts(20, longest=12, seed=1)
DOCUMENTS = random_texts(20, longest=30, seed=2)
COSTS = {
    "none": LevelCost(0, 1),
    "layers": LevelCost(10, 0.67),
    "products": LevelCost(100, 0),
    "all": LevelCost(170, 0),
}


@pytest.fixture(autouse=True, scope="module")
def _built_once():
    """Build DeepSpeed's extension here, not in each of the ranks."""
    prepare(torch.device("cpu"))


def tiny_chunk(encoder, num_texts=8, budget=10**6):
    texts = Texts.from_lists(random_texts(num_texts, longest=30, seed=3))
    return encoder.make_chunks(texts, budget)[1][0]


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("keep", LEVELS)
def test_units_are_the_work_really_done(keep, packing):
    """All multiplications of a step, counted, divided by those of a forward pass."""
    # With dropout, attention on a CPU is made of plain products, whose backward passes count too.
    encoder, loss = tiny_encoder(dropout=0.1, packing=packing), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=100, keep=keep)
    texts = Texts.from_lists([*QUERIES, *DOCUMENTS])
    with _Counter() as forward, torch.no_grad():
        for chunk in encoder.make_chunks(texts, 100)[1]:
            encoder(chunk)
    step(QUERIES, DOCUMENTS)  # measures
    with _Counter() as whole:
        report = step.accumulate(rank_batch(QUERIES, DOCUMENTS))
    contrast = 3 * 20 * 20 * 16  # products of the loss itself, at least
    units = (whole.flops["all"] - contrast) / forward.flops["all"]
    assert report.work.units == pytest.approx(units, rel=0.02)
    expected = {"none": 4, "layers": 3.8, "products": 3, "all": 3}[keep]
    assert report.work.units == pytest.approx(expected, abs=0.1)


def test_measured_costs_are_those_of_bert():
    encoder = tiny_encoder(packing="off")
    chunk = tiny_chunk(encoder)
    costs = measure_levels(encoder, chunk, list(encoder.parameters()))
    n, length = chunk.input_ids.shape
    hidden, inner, layers, width = 16, 32, 2, 8
    # Per token and layer: the second feed-forward product.
    assert costs["layers"].bytes_per_token == width * layers * hidden
    kept = 4 * hidden + inner + hidden + hidden  # q k v o, both feed-forward products, attention
    logsumexp = 2  # one number per head
    pooled = hidden / length
    assert costs["products"].bytes_per_token == pytest.approx(
        width * (layers * kept + pooled) + 4 * layers * logsumexp, rel=0.05
    )
    per_layer = 4 * hidden**2 + 2 * hidden * inner + 2 * length * hidden
    expected = 1 - hidden * inner / per_layer
    assert costs["layers"].recomputed == pytest.approx(expected, rel=0.02)
    assert costs["all"].bytes_per_token > costs["products"].bytes_per_token
    assert costs["none"] == LevelCost(0, 1)
    assert n > 1


def test_measuring_moves_neither_weights_nor_the_generator():
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    found = []
    for plan in (None, KeepPlan(COSTS, None)):
        encoder.zero_grad()
        torch.manual_seed(3)
        step = GradCache(encoder, loss, tokens_per_chunk=60, keep="layers")
        step.memory.keep_plan = plan
        step(QUERIES, DOCUMENTS)
        found.append(gradients(encoder))
    assert relative_error(found[0], found[1]) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    st.integers(0, 10**6),
    st.sampled_from(["auto", *LEVELS]),
)
def test_levels_stay_within_the_budget(tokens, budget_bytes, keep):
    chosen = KeepPlan(COSTS, budget_bytes).levels(keep, tokens)
    used = sum(COSTS[level].bytes_per_token * t for level, t in zip(chosen, tokens, strict=True))
    assert used <= budget_bytes
    assert set(chosen) <= ({"none", keep} if keep != "auto" else set(LEVELS))
    if keep == "auto" and "products" in chosen:
        # No chunk keeps much where another, that would fit, keeps nothing.
        left = budget_bytes - used
        assert all(
            10 * t > left for t, level in zip(tokens, chosen, strict=True) if level == "none"
        )


def timed(**seconds):
    return {level: cost._replace(seconds_per_token=seconds[level]) for level, cost in COSTS.items()}


INF = float("inf")


@pytest.mark.parametrize(
    ("seconds", "levels"),
    [
        ((4.0, 3.8, 3.2, 3.0), ["none", "layers", "products", "all"]),
        ((4.0, 4.5, 4.1, 3.0), ["none", "all"]),  # a narrow model
        ((4.0, 3.6, 3.7, 3.65), ["none", "layers"]),
        ((4.0, 3.95, 3.93, 3.94), ["none"]),  # too little for the memory
        ((4.0, INF, INF, 3.0), ["none", "all"]),  # compiled layers
        ((4.0, 3.8, 3.2, INF), ["none", "layers", "products"]),  # a graph doesn't fit
        ((0.0, 0.0, 0.0, 0.0), ["none", "layers", "products", "all"]),  # not measured
    ],
)
def test_auto_keeps_what_is_faster(seconds, levels):
    plan = KeepPlan(timed(**dict(zip(LEVELS, seconds, strict=True))), 10**6)
    assert plan.worthwhile == levels
    assert KeepPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    tokens = [100, 70, 30]
    for budget in (0, 900, 2500, 13000, 10**6, None):
        chosen = plan._replace(budget_bytes=budget).levels("auto", tokens)
        assert set(chosen) <= set(levels)
        if budget in (10**6, None):
            assert chosen == [levels[-1]] * 3
        # Who asks for a level gets it.
        assert plan.levels("products", tokens) == ["products"] * 3


@pytest.mark.parametrize("compiled", [False, True])
def test_levels_are_timed_on_the_side(monkeypatch, compiled):
    encoder = tiny_encoder(dropout=0.3)
    (chunk,) = encoder.make_chunks(Texts.from_lists(DOCUMENTS), 10**6)[1]
    taken = []

    def embed(forward, chunk, level):
        taken.append(level)
        return embed_keeping(forward, chunk, level)

    monkeypatch.setattr(keep_module, "embed_keeping", embed)
    if compiled:
        monkeypatch.setattr(keep_module, "is_compiled", lambda _: True)
    seconds = time_levels(encoder, chunk, list(encoder.parameters()), tries=2)
    expected = ["none", "all"] if compiled else list(LEVELS)
    assert taken == 2 * expected
    assert [level for level in LEVELS if 0 < seconds[level] < 60] == expected
    assert all(p.grad is None for p in encoder.parameters())


def test_a_level_without_room_takes_forever(monkeypatch):
    encoder = tiny_encoder()
    (chunk,) = encoder.make_chunks(Texts.from_lists(DOCUMENTS), 10**6)[1]

    def embed(forward, chunk, level):
        if level == "all":
            raise torch.OutOfMemoryError
        return embed_keeping(forward, chunk, level)

    monkeypatch.setattr(keep_module, "embed_keeping", embed)
    seconds = time_levels(encoder, chunk, list(encoder.parameters()))
    assert [level for level in LEVELS if seconds[level] == INF] == ["all"]


def test_auto_times_what_it_chooses_from(monkeypatch):
    seconds = dict(zip(LEVELS, (4.0, 4.5, 3.2, 3.1), strict=True))
    monkeypatch.setattr(passes, "time_levels", lambda *_: seconds)
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=60, keep="auto", keep_gib=1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert step.accumulate(rank_batch(QUERIES, DOCUMENTS)).units == pytest.approx(3.0, abs=0.1)
    assert torch.equal(state, torch.get_rng_state())  # no dropout, and nothing else has drawn
    assert step.memory.keep_plan.worthwhile == ["none", "products", "all"]


def test_auto_takes_more_of_a_larger_budget():
    tokens = [100, 100, 100]
    assert KeepPlan(COSTS, 0).levels("auto", tokens) == ["none"] * 3
    assert KeepPlan(COSTS, 2500).levels("auto", tokens) == ["layers", "layers", "none"]
    assert KeepPlan(COSTS, 13000).levels("auto", tokens) == ["products", "layers", "layers"]
    assert KeepPlan(COSTS, 10_000).levels("auto", [100]) == ["products"]  # it takes 10,000
    assert KeepPlan(COSTS, 10**6).levels("auto", tokens) == ["all"] * 3
    assert KeepPlan(COSTS, None).levels("products", tokens) == ["products"] * 3
    units = [
        KeepPlan(COSTS, b).units(KeepPlan(COSTS, b).levels("auto", tokens), tokens)
        for b in (0, 2500, 13000, 10**6)
    ]
    assert units == pytest.approx([4, 3 + 2.34 / 3, 3 + 1.34 / 3, 3])


def test_a_decision_is_stored_and_set_again():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    first = GradCache(encoder, loss, tokens_per_chunk=60, keep="auto", keep_gib=3e-4)
    assert first.memory.keep_plan is None
    report = first.accumulate(rank_batch(QUERIES, DOCUMENTS))
    stored = json.loads(json.dumps(first.memory.keep_plan.to_dict()))
    again = GradCache(encoder, loss, tokens_per_chunk=60, keep="auto", keep_gib=99)
    again.memory.keep_plan = KeepPlan.from_dict(stored)
    assert again.memory.keep_plan == first.memory.keep_plan
    assert again.accumulate(rank_batch(QUERIES, DOCUMENTS)).units == report.work.units
    assert 3 < report.work.units < 4


def test_attention_that_draws_dropout_is_computed_again():
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    q = torch.zeros(1, 1, 4, 8)
    assert _is_kept("products", flash, (q, q, q), {})
    assert _is_kept("products", flash, (q, q, q, 0.0), {})
    assert not _is_kept("products", flash, (q, q, q, 0.1), {})
    assert not _is_kept("products", flash, (q, q, q), {"dropout_p": 0.1})
    assert not _is_kept("products", efficient, (q, q, q, None, True, 0.1), {})
    assert not _is_kept("layers", flash, (q, q, q, 0.0), {})


class EqualChunks:
    """A strategy like ddp that demands equally many passes of all ranks, and counts them."""

    equal_chunks = True
    can_redo = False

    def __init__(self, encoder, loss):
        self.module = encoder
        self.parameters = [*encoder.parameters(), *loss.parameters()]
        self.passes = []

    def encoder(self, chunk):
        self.passes.append(("forward", torch.is_grad_enabled()))
        return self.module(chunk)

    @contextmanager
    def gradient_pass(self):
        with one_reduction(self.parameters, Collectives()):
            yield self.backward

    def backward(self, embeddings, gradients, *, last):
        self.passes.append(("backward", len(embeddings), last))
        backward(embeddings, gradients, last=last)


def add_in_place(product):
    product += 0.5


def scale_a_view_in_place(product):
    product[:, :2].mul_(2.0)


def write_into(product):
    torch.neg(product.detach(), out=product.detach())


@pytest.mark.parametrize("overwrite", [add_in_place, scale_a_view_in_place, write_into])
@pytest.mark.parametrize("level", ["layers", "products"])
def test_what_is_overwritten_is_kept_as_it_was(level, overwrite):
    """As the linear layers that DeepSpeed puts in under ZeRO-3 add their bias in place."""
    generator = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 8), (8, 4), (4, 3))
    )

    def forward(x):
        product = x.tanh() @ first
        overwrite(product)
        product = product.sin() @ second
        overwrite(product)
        return product.cos()

    expected = torch.autograd.grad(forward(x).sum(), (x, first, second))
    found = torch.autograd.grad(embed_keeping(forward, x, level).sum(), (x, first, second))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize(
    "options", [{"keep": level} for level in LEVELS] + [{"keep": "auto", "keep_gib": 3e-4}], ids=str
)
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
        return gradients(encoder, loss), strategy.passes, report.work.num_chunks, report.work.units

    results = run_ranks(on_rank, 3)
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    for found, done, _, _ in results:
        assert relative_error(found, expected) < 1e-6
        assert done == results[0][1]
        assert [one[2] for one in done if one[0] == "backward"].count(True) == 1
        assert done[-1][-1] is not False
    assert [num_chunks for _, _, num_chunks, _ in results][1] == 0
    assert results[0][2] > results[2][2] > 0


OPTIONS = [
    {"keep": "layers"},
    {"keep": "products", "packing": "on"},
    {"keep": "auto", "keep_gib": 2e-4},
]


# test_fast_paths has each level under each strategy; here is what the optimizer makes of it.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name,
            options,
            id=f"{name}-{options}",
            marks=() if number % len(OPTIONS) == place else pytest.mark.exhaustive,
        )
        for number, name in enumerate(("zero3", "fsdp", "zero1", "zero2"))
        for place, options in enumerate(OPTIONS)
    ],
)
def test_every_strategy_keeps(name, options):
    def on_rank():
        keep_options = dict(options)
        packing = keep_options.pop("packing", "off")
        dtype = torch.float64 if name == "fsdp" else torch.float32
        encoder = tiny_encoder(packing=packing, dtype=dtype)
        loss = tiny_loss(symmetric=True, dtype=dtype)
        config = StrategyConfig(name="fsdp")
        if name != "fsdp":
            thresholds = {"stage3_param_persistence_threshold": 0}
            config = StrategyConfig(
                name="deepspeed",
                zero_stage=int(name[-1]),
                config={"zero_optimization": thresholds},
            )
        strategy = make_strategy(
            config,
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
        return float(norm), {n: m for n, m in moments.items() if n.startswith("exp_avg.")}, report

    results = run_ranks(on_rank, 2)
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    tolerance = 1e-6 if name == "fsdp" else 1e-4
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    assert [norm for norm, _, _ in results] == pytest.approx([norm] * 2, rel=tolerance)
    # After the first step the first moment is (1 - beta1) times the gradient.
    moments = results[0][1]
    found = {name.split(".", 2)[2]: m / (1 - OptimConfig().beta1) for name, m in moments.items()}
    assert relative_error({n: found[n] for n in expected}, expected) < tolerance
    assert all(3 <= report.work.units < 4 for _, _, report in results)


def test_ranks_agree_on_costs_and_budget():
    def on_rank():
        rank = torch.distributed.get_rank()
        costs = {level: LevelCost(b + rank, r, s + rank) for level, (b, r, s) in COSTS.items()}
        plan = KeepPlan(costs, 1000 - rank).agreed(Collectives())
        unlimited = KeepPlan(costs, None).agreed(Collectives())
        return plan.to_dict(), unlimited.budget_bytes

    for plan, unlimited in run_ranks(on_rank, 2):
        assert plan["budget_bytes"] == 999
        assert plan["costs"]["products"] == [101, 0, 1]
        assert unlimited is None


def test_options_that_cannot_be():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    with pytest.raises(UserError, match="keep='some' is not one of auto, none, layers"):
        GradCache(encoder, loss, keep="some")
    with pytest.raises(UserError, match="keep_gib=-1 must be at least 0"):
        GradCache(encoder, loss, keep_gib=-1)
    with pytest.raises(UserError, match="keep=auto needs keep_gib where there is no GPU"):
        GradCache(encoder, loss, keep="auto")(QUERIES, DOCUMENTS)


def test_the_budget_of_a_gpu_leaves_room(monkeypatch):
    encoder = tiny_encoder()
    on_gpu = SimpleNamespace(device=torch.device("cuda"), parameters=encoder.parameters)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000_000, 2_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100_000)
    weights = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    room = 1_200_000 - 3 * weights - 2 * 170 * 100
    assert room > 0
    assert measured_budget(on_gpu, COSTS, 100) == int(0.8 * room)
    assert measured_budget(on_gpu, COSTS, 10**6) == 0
