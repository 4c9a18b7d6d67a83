"""Every contrastive loss beyond InfoNCE, through the cached step, against its formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from all_pairs import combined
from collective_counts import counted
from dist import run_ranks
from numerics.reference import (
    embed,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
)
from numerics.test_no_waiting import WAITS
from torch.profiler import ProfilerActivity, profile

from largebatch.config import LossOptions
from largebatch.losses import candidates as candidates_module
from largebatch.losses.masks import PairHashes
from largebatch.losses.temperature import Temperature
from largebatch.objectives import contrastive
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.gradcache import GradCache
from largebatch.step.guide import Guide
from largebatch.step.matryoshka import Matryoshka

NUM_PAIRS = 13
QUERIES = random_texts(NUM_PAIRS, longest=9, seed=1)
DOCUMENTS = random_texts(NUM_PAIRS, longest=25, seed=2)
COUNTS = np.array([0, 2, 1, 0, 4, 1, 0, 0, 3, 1, 1, 0, 2])
OWNERS = np.repeat(np.arange(NUM_PAIRS), COUNTS)
NEGATIVES = random_texts(len(OWNERS), longest=20, seed=9)
IDS = [f"id {row}" for row in range(NUM_PAIRS)]
# False negatives by texts, of each kind.
DOCUMENTS[9] = DOCUMENTS[0]
QUERIES[12] = QUERIES[1]
NEGATIVES[0] = DOCUMENTS[12]  # pair 1's own negative is a document of its query
NEGATIVES[4] = DOCUMENTS[11]
IDS[8] = IDS[4]
LAYOUTS = {1: [0, 13], 2: [0, 9, 13], 3: [0, 4, 4, 13]}

ALL = ["query_document", "query_query", "document_query", "document_document"]
MODES = {
    "infonce": {},
    "gte": {"candidates": ALL, "repeat_positive": True},
    "simlm": {"candidates": ALL},
    "qwen3": {
        "candidates": ["query_document", "query_query", "document_document"],
        "own_negatives": True,
        "mask_margin": 0.02,
    },
    "own only": {"own_negatives": True, "in_batch": False},
    "own only, masked": {"own_negatives": True, "in_batch": False, "mask_share": 0.97},
    "apart": {"own_negatives": True, "own_apart": True},
    "both ways apart": {"own_negatives": True, "own_apart": True, "symmetric": True},
    "both ways, masked": {"symmetric": True, "mask_margin": -0.01, "mask_share": 1.02},
    "texts unknown": {"candidates": ALL, "mask_duplicates": False},
    "guide": {"candidates": ALL, "mask_margin": 0.01, "guide": True},
    "guide of own": {
        "own_negatives": True,
        "candidates": ["query_document", "document_document"],
        "mask_share": 1.0,
        "guide": True,
    },
    "hardness": {"own_negatives": True, "hardness": 3.0, "own_hardness": 5.0},
    "widths": {"matryoshka": Matryoshka.of([16, 5], reduction="mean")},
    "widths, both ways": {
        "symmetric": True,
        "own_negatives": True,
        "matryoshka": Matryoshka.of([3, 8], weights=[0.7, 0.2]),
    },
    "widths, masked": {
        "candidates": ALL,
        "mask_margin": 0.0,
        "matryoshka": Matryoshka.of([16, 7]),
    },
}


def plain_loss(q, d, n, scale, mode, guided):
    """Return the mean loss and the share of candidates that are masked, pair by pair.

    Args:
        q, d, n: Embeddings of queries, documents and negatives.
        scale: 1 / temperature.
        mode: As the arguments of ContrastiveLoss.
        guided: The guide's q, d and n.
    """
    judges = guided if mode.get("guide") else [one.detach() for one in (q, d, n)]
    own_only, apart = mode.get("own_negatives", False), mode.get("own_apart", False)
    losses, masked, possible = [], 0, 0

    def left(row, a, side, others, judged, texts, known, own=None, hardness=0.0):
        """Return the logits of what `a[row]` is contrasted with."""
        nonlocal masked, possible
        top = judges[0][row] @ judges[1][row]
        highest = torch.inf
        if "mask_margin" in mode:
            highest = top + mode["mask_margin"]
        if "mask_share" in mode:
            highest = min(highest, top - (1 - mode["mask_share"]) * abs(top))
        kept = []
        for column in range(len(others)):
            if column == own:
                continue
            possible += 1
            false = mode.get("mask_duplicates", True) and texts[column] in known
            if false or judges[side][row] @ judged[column] > highest:
                masked += 1
            else:
                score = a[row] @ others[column]
                kept.append(scale * score + hardness * score.detach())
        return torch.stack(kept) if kept else q.new_full((1,), -torch.inf)

    for i in range(NUM_PAIRS):
        pairs = range(NUM_PAIRS)
        same = [j for j in pairs if QUERIES[j] == QUERIES[i] or IDS[j] == IDS[i]]
        answers = [QUERIES[i], *(DOCUMENTS[j] for j in same)]
        same = [j for j in pairs if DOCUMENTS[j] == DOCUMENTS[i] or IDS[j] == IDS[i]]
        asks = [DOCUMENTS[i], *(QUERIES[j] for j in same)]
        positive = scale * q[i] @ d[i]
        kinds = {}
        if mode.get("in_batch", True):
            wanted = mode.get("candidates", ["query_document"])
            wanted = [*wanted, "document_query"] if mode.get("symmetric") else wanted
            if "query_document" in wanted:
                hardness = mode.get("hardness", 0.0)
                kinds["qd"] = left(i, q, 0, d, judges[1], DOCUMENTS, answers, i, hardness)
                if not own_only:
                    further = left(i, q, 0, n, judges[2], NEGATIVES, answers)
                    kinds["qd"] = torch.cat([kinds["qd"], further])
            if "query_query" in wanted:
                kinds["qq"] = left(i, q, 0, q, judges[0], QUERIES, asks, i)
            if "document_query" in wanted:
                kinds["dq"] = left(i, d, 1, q, judges[0], QUERIES, asks, i)
            if "document_document" in wanted:
                kinds["dd"] = left(i, d, 1, d, judges[1], DOCUMENTS, answers, i)
        own = None
        if own_only:
            mine = np.flatnonzero(i == OWNERS)
            texts = [NEGATIVES[one] for one in mine]
            hardness = mode.get("own_hardness", 0.0)
            own = left(i, q, 0, n[mine], judges[2][mine], texts, answers, None, hardness)

        def loss_of(*parts, times=1, positive=positive):
            others = torch.cat(parts)
            if others.isneginf().all():
                return torch.log(positive.new_tensor(float(times)))
            return torch.cat([positive[None]] * times + list(parts)).logsumexp(0) - positive

        with_own = [] if own is None or apart else [own]
        if mode.get("symmetric"):
            loss = (loss_of(kinds["qd"], *with_own) + loss_of(kinds["dq"])) / 2
        elif kinds:
            times = 2 if mode.get("repeat_positive") else 1
            loss = loss_of(*kinds.values(), *with_own, times=times)
        else:
            loss = loss_of(own)
        losses.append(loss + loss_of(own) if apart and kinds else loss)
    return torch.stack(losses).mean(), masked / possible


def made(mode):
    """Return an encoder and the objective of a mode, the same on every rank."""
    mode = dict(mode)
    if mode.pop("guide", False):
        mode["guide"] = Guide(tiny_encoder(seed=5), tokens_per_chunk=50)
    loss = ContrastiveLoss(Temperature(0.3, learned=True), **mode)
    return tiny_encoder(), loss.double()


def expected(mode):
    encoder, loss = made(mode)
    guided = None
    if loss.guide is not None:
        with torch.no_grad():
            guided = [embed(loss.guide.encoder, side) for side in (QUERIES, DOCUMENTS, NEGATIVES)]
    sides = [embed(encoder, side) for side in (QUERIES, DOCUMENTS, NEGATIVES)]
    scale = loss.temperature()
    if "matryoshka" in mode:
        value, masked = 0, None
        for dim, weight in zip(*mode["matryoshka"], strict=True):
            cut = [F.normalize(side[:, :dim], dim=1) for side in sides]
            one, share = plain_loss(*cut, scale, mode, guided)
            value = value + weight * one
            masked = share if dim == max(mode["matryoshka"].dims) else masked
    else:
        value, masked = plain_loss(*sides, scale, mode, guided)
    value.backward()
    return float(value.detach()), gradients(encoder, loss), masked


def batch_of(rank, size, **others):
    rows = range(*LAYOUTS[size][rank : rank + 2])
    own = [n for n, owner in enumerate(OWNERS) if owner in rows]
    return rank_batch(
        [QUERIES[i] for i in rows],
        [DOCUMENTS[i] for i in rows],
        [NEGATIVES[n] for n in own],
        negative_counts=COUNTS[list(rows)],
        ids=[IDS[i] for i in rows],
        **others,
    )


def on_rank(name, balance, keep, packing, plant=None):
    if plant is not None:
        plant()
    encoder, loss = made(MODES[name])
    encoder.packing = packing
    world = Collectives().world
    step = GradCache(encoder, loss, tokens_per_chunk=60, balance=balance, keep=keep)
    report = step.accumulate(batch_of(world.rank, world.size))
    metrics = {key: float(value) for key, value in report.metrics.items()}
    return float(report.loss), gradients(encoder, loss), metrics


@combined(
    name=list(MODES),
    world_size=[1, 2, 3],
    balance=[True, False],
    keep=["none", "all"],
    packing=["on", "off"],
)
def test_the_gradient_is_that_of_the_formula(name, world_size, balance, keep, packing):
    value, wanted, masked = expected(MODES[name])
    for loss, found, metrics in run_ranks(on_rank, world_size, name, balance, keep, packing):
        assert loss == pytest.approx(value, rel=1e-9)
        assert relative_error(found, wanted) < 1e-6
        assert metrics["masked_share"] == pytest.approx(masked)
        assert metrics["temperature"] == pytest.approx(0.3)


MASKED = [name for name, mode in MODES.items() if {"mask_margin", "mask_share"} & mode.keys()]


@pytest.mark.parametrize("name", MASKED)
def test_scores_mask_some_and_leave_some(name):
    """Else the comparison above would say nothing of them."""
    with_scores = expected(MODES[name])[2]
    scores = ("mask_margin", "mask_share", "guide")
    plainly = {option: value for option, value in MODES[name].items() if option not in scores}
    without = expected(plainly)[2]
    assert without + 0.02 < with_scores < 0.98


def lose_the_positive():
    """Z sums the others only."""
    contrastive.losses_of_rows = lambda positive, others, times=1: others - positive


def give_negatives_to_the_next():
    """Each negative belongs to the row after its own."""
    plain = ContrastiveLoss._own_negatives

    def shifted(batch, false_negatives):
        counts = np.roll(batch.negative_counts, 1)
        return plain(batch._replace(negative_counts=counts), false_negatives)

    ContrastiveLoss._own_negatives = staticmethod(shifted)


def turn_the_masks_around():
    """Queries are masked as if they were documents."""

    def of_queries(self):
        own = [
            PairHashes(one.queries, one.queries, one.negatives[:0], one.ids)
            for one in self._of_ranks
        ]
        return self._make("queries", own, with_negatives=False)

    contrastive.TextMasks.of_queries = of_queries


def shift_the_guide():
    """What the guide says of a column, it said of the one before."""
    plain = Guide.embed

    def shifted(self, batch, sides):
        found = plain(self, batch, sides)
        return found._replace(gathered_mg=found.gathered_mg.roll(1, 0))

    Guide.embed = shifted


def keep_the_own_query():
    """A query is contrasted with itself."""
    plain = ContrastiveLoss._candidates

    def found(self, kind, *others):
        one = plain(self, kind, *others)
        return one._replace(own_b=one.own_b.roll(1)) if kind == "query_query" else one

    ContrastiveLoss._candidates = found


def forget_the_limit_going_back():
    """Scores beyond the limit have a gradient."""
    plain = candidates_module._Tiles.beyond
    backward = candidates_module._TiledLogSumExps.backward

    def forgetful(ctx, *grads):
        candidates_module._Tiles.beyond = lambda *_: None
        try:
            return backward(ctx, *grads)
        finally:
            candidates_module._Tiles.beyond = plain

    candidates_module._TiledLogSumExps.backward = staticmethod(forgetful)


def nothing():
    """Plant no mistake."""


@pytest.mark.parametrize(
    ("name", "plant", "is_wrong"),
    [
        ("guide", nothing, False),
        ("simlm", lose_the_positive, True),
        ("qwen3", give_negatives_to_the_next, True),
        ("simlm", turn_the_masks_around, True),
        ("simlm", keep_the_own_query, True),
        ("guide", shift_the_guide, True),
        ("qwen3", forget_the_limit_going_back, True),
    ],
)
def test_the_comparison_sees_mistakes(name, plant, is_wrong):
    _, wanted, _ = expected(MODES[name])
    found = run_ranks(on_rank, 2, name, True, "none", "on", plant)
    errors = [relative_error(one, wanted) for _, one, _ in found]
    assert (max(errors) > 1e-3) == is_wrong


def collectives_of_a_step(name):
    encoder, loss = made(MODES[name])
    world = Collectives().world
    step = GradCache(encoder, loss, tokens_per_chunk=60, balance=False)
    step.accumulate(batch_of(world.rank, world.size))  # which finds out how much room is needed
    with counted() as calls:
        step.accumulate(batch_of(world.rank, world.size))
    return calls


@pytest.mark.parametrize("name", ["simlm", "widths, both ways", "widths, masked"])
def test_one_gather_and_one_reduction_whatever_is_summed(name):
    usual = run_ranks(collectives_of_a_step, 2, "infonce")[0]
    # One all-gather of numbers and one of embeddings; the loss, and the gradients of weights.
    assert [one for one in usual if "gather" in one or "scatter" in one] == [
        "_allgather_base_",
        "_allgather_base_",
        "_reduce_scatter_base_",
    ]
    for calls in run_ranks(collectives_of_a_step, 2, name):
        assert calls == usual


@pytest.mark.parametrize("name", ["gte", "qwen3", "apart", "guide", "widths, both ways"])
def test_a_step_does_not_wait(name):
    encoder, loss = made(MODES[name])
    step = GradCache(encoder, loss, tokens_per_chunk=60)
    step.accumulate(batch_of(0, 1))  # what is measured or allocated once
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step.accumulate(batch_of(0, 1))
    names = [event.name for event in profiled.events()]
    assert len(names) > 100
    assert [one for one in names if one in WAITS] == []


def by_source(options):
    encoder, loss = made(MODES["simlm"])
    loss.guide = None
    step = GradCache(encoder, loss, tokens_per_chunk=60)
    return float(step.accumulate(batch_of(0, 1, loss_options=options)).loss)


def test_a_source_switches_the_batch_off():
    found = run_ranks(by_source, 1, LossOptions(in_batch=False, negatives="own"))[0]
    assert found == pytest.approx(expected(MODES["own only"])[0], rel=1e-9)
    found = run_ranks(by_source, 1, LossOptions())[0]
    assert found == pytest.approx(expected(MODES["simlm"])[0], rel=1e-9)


def test_a_scheduled_temperature_is_that_of_the_step():
    encoder = tiny_encoder()
    schedule = Temperature(0.4, final_value=0.2, steps=10)
    for candidates in (["query_document"], ALL):
        found, wanted = [], []
        for step in (0, 5, 30):
            given = batch_of(0, 1, step=step)
            for values, temperature in (
                (found, schedule),
                (wanted, Temperature(schedule.at(step))),
            ):
                loss = ContrastiveLoss(temperature, candidates=candidates)
                report = GradCache(encoder, loss).accumulate(given)
                values.append((float(report.loss), float(report.metrics["temperature"])))
                encoder.zero_grad()
        assert found == [pytest.approx(one, rel=1e-6) for one in wanted]
        assert found[0][1] == pytest.approx(0.4)
        assert found[1][1] == pytest.approx(0.3)
        assert found[0] != found[1]
