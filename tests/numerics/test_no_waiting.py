"""No step waits for its device, and its phases are marked."""

import time

import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    tiny_encoder,
    tiny_loss,
)
from torch.profiler import ProfilerActivity, profile

from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.gradcache import GradCache
from largebatch.parallel import collectives as collectives_module
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.phases import PHASES, timed_phases
from largebatch.world import part_of_rank

WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
"""Operations that bring a number from the device to the host, or a shape that depends on one."""


class Step:
    """What train_step does, on this rank."""

    def __init__(self, *, keep="none", packing="off", symmetric=True, device="cpu"):
        self.encoder = tiny_encoder(dropout=0.1, dtype=torch.float32, packing=packing).to(device)
        self.loss = tiny_loss(symmetric=symmetric, dtype=torch.float32).to(device)
        collectives = Collectives()
        self.strategy = ReplicatedModel(self.encoder, self.loss, OptimConfig(), collectives)
        self.cache = GradCache(
            self.encoder, self.loss, tokens_per_chunk=64, keep=keep, strategy=self.strategy
        )
        rows = part_of_rank(NUM_PAIRS, collectives.world.rank, collectives.world.size)
        self.texts = [Texts.from_lists([side[i] for i in rows]) for side in (QUERIES, DOCUMENTS)]
        self.ids = [f"record {i}" for i in rows]

    def __call__(self):
        self.cache.report(*self.texts, ids=self.ids)
        self.strategy.clip_gradients(1.0)
        self.strategy.step(1e-3)
        self.strategy.zero_grad()
        self.loss.temperature.clamp_()


def events_of_a_step(options):
    step = Step(**options)
    step()  # what is measured or allocated once
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return [
        (event.name, event.cpu_parent.name if event.cpu_parent is not None else "")
        for event in profiled.events()
    ]


def waits(events):
    # AdamW on a CPU reads its count of steps, which lies there; on a GPU it doesn't.
    return [
        one
        for one in events
        if one[0] in WAITS and one[1] not in ("aten::_fused_adamw_", "aten::item")
    ]


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("keep", ["none", "layers", "all"])
def test_a_step_does_not_wait(keep, packing):
    events = events_of_a_step({"keep": keep, "packing": packing})
    assert len(events) > 100
    assert waits(events) == []


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_step_on_two_ranks_does_not_wait(symmetric):
    for events in run_ranks(events_of_a_step, 2, {"symmetric": symmetric}):
        assert waits(events) == []
        names = {name for name, _ in events}
        assert {
            f"largebatch/{name}" for name in ("embed", "gather", "loss", "replay", "sync")
        } <= names


def test_the_profiler_sees_who_waits(monkeypatch):
    plain = ReplicatedModel.clip_gradients
    monkeypatch.setattr(
        ReplicatedModel, "clip_gradients", lambda self, norm: float(plain(self, norm))
    )
    assert len(waits(events_of_a_step({}))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep", ["none", "layers", "all"])
def test_a_step_on_a_gpu_does_not_wait(keep):
    step = Step(keep=keep, device="cuda")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_phases_are_the_step():
    step = Step()
    step()
    with timed_phases(torch.device("cpu")) as clock:
        start = time.perf_counter()
        step()
        seconds = clock.read()
        whole = time.perf_counter() - start
    assert set(seconds) == set(PHASES)
    # Its data and optimizer are the caller's here, and one rank has nothing to average.
    assert min(seconds[name] for name in ("embed", "gather", "loss", "replay")) > 0
    assert 0.5 * whole < sum(seconds.values()) <= whole
    assert set(clock.read().values()) == {0.0}


def order_of_work():
    """Return the chunks' kinds and the gather of columns, in the order in which they began."""
    step = Step()
    order = []
    plain_forward, plain_gather = step.encoder.forward, collectives_module._all_gather
    longest = int(step.texts[0].lengths.max())

    def forward(chunk):
        if not torch.is_grad_enabled():
            order.append("queries" if chunk.input_ids.shape[1] <= longest else "columns")
        return plain_forward(chunk)

    def all_gather(out, own, **options):
        if own.is_floating_point():
            order.append("gather")
            assert options["async_op"]
        return plain_gather(out, own, **options)

    step.encoder.forward = forward
    collectives_module._all_gather = all_gather
    # Columns are longer than queries here, so a chunk's length tells its kind.
    step.texts[1] = Texts.from_lists([[7] * (longest + 1 + i) for i in range(len(step.ids))])
    step()
    return order


def test_columns_are_sent_while_queries_are_embedded():
    for order in run_ranks(order_of_work, 2):
        assert order.count("gather") == 1
        sent = order.index("gather")
        assert set(order[:sent]) == {"columns"}
        assert set(order[sent + 1 :]) == {"queries"}
