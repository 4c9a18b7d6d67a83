"""No step waits for its device, and its phases are marked."""

import time

import pytest
import torch
from dist import run_ranks
from numerics.one_step import Step
from torch.profiler import ProfilerActivity, profile

from largebatch.batch import Texts
from largebatch.parallel import collectives as collectives_module
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.phases import PHASES, timed_phases

WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
"""Operations that bring a number from the device to the host, or a shape that depends on one."""


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
@pytest.mark.parametrize("keep", ["none", "all"])
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


def test_the_phases_are_the_step():
    step, shares = Step(), []
    step()
    with timed_phases(torch.device("cpu")) as clock:
        for _ in range(5):
            start = time.perf_counter()
            step()
            seconds = clock.read()
            shares.append(sum(seconds.values()) / (time.perf_counter() - start))
            assert set(seconds) == set(PHASES)
            # Its data and optimizer are the caller's here, and one rank has nothing to average.
            assert min(seconds[name] for name in ("embed", "gather", "loss", "replay")) > 0
    # On a busy machine one or the other step is interrupted between its phases.
    assert max(shares) > 0.5
    assert max(shares) <= 1
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
