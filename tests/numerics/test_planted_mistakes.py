"""Mistakes that distributed trainers make must turn the comparison of test_gradient.py red."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    gradients,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

import largebatch.model.encoder as encoder_module
import largebatch.step.gradcache
from largebatch.batch import LengthGroup, Texts
from largebatch.model import attention
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel import collectives, ddp
from largebatch.step.distinct import DistinctTexts, distinct_texts
from largebatch.step.dropout import RandomState
from largebatch.step.gradcache import GradCache
from largebatch.world import part_of_rank


def lose_world_size_factor():
    """The loss is divided by all rows, and then averaged over ranks once more."""
    plain = ContrastiveLoss.compute

    def evaluate(self, batch):
        value = plain(self, batch)
        return value._replace(own_share=value.own_share / batch.collectives.world.size)

    ContrastiveLoss.compute = evaluate


def drop_other_ranks_rows():
    """The gather's backward returns this rank's own gradient, without the other ranks' share."""

    def backward(ctx, grad):
        return grad.split(ctx.counts)[ctx.rank], None, None

    collectives._GatherRows.backward = staticmethod(backward)


def average_over_unequal_parts():
    """Each rank takes the mean over its own rows, however many they are."""
    plain = ContrastiveLoss.compute

    def evaluate(self, batch):
        value = plain(self, batch)
        right = NUM_PAIRS / batch.collectives.world.size
        return value._replace(own_share=value.own_share * right / len(batch.queries_bd))

    ContrastiveLoss.compute = evaluate


def forget_the_temperature():
    """The reduction averages the encoder's gradients only."""
    plain = ddp.average_gradients
    ddp.average_gradients = lambda parameters, size: plain(
        [p for p in parameters if p.ndim > 0], size
    )


def nothing():
    """Plant no mistake."""


def gradient_on_rank(plant, symmetric):
    plant()
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=symmetric)
    rows = part_of_rank(NUM_PAIRS, torch.distributed.get_rank(), 3)
    GradCache(encoder, loss, tokens_per_chunk=40)(
        [QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]
    )
    return gradients(encoder, loss)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("plant", "is_wrong"),
    [
        (nothing, False),
        (lose_world_size_factor, True),
        (drop_other_ranks_rows, True),
        (average_over_unequal_parts, True),
        (forget_the_temperature, True),
    ],
)
def test_the_comparison_sees_it(plant, is_wrong, symmetric):
    _, expected = full_batch_gradient(
        tiny_encoder(), tiny_loss(symmetric=symmetric), QUERIES, DOCUMENTS
    )
    # The mistakes are planted in the ranks' own processes, and vanish with them.
    errors = [
        relative_error(found, expected)
        for found in run_ranks(gradient_on_rank, 3, plant, symmetric)
    ]
    assert (max(errors) > 1e-3) == is_wrong


def test_a_skipped_restore_of_the_random_state_is_seen(monkeypatch):
    def cached():
        encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
        torch.manual_seed(1)
        GradCache(encoder, loss, tokens_per_chunk=40)(QUERIES, DOCUMENTS)
        return gradients(encoder, loss)

    right = cached()
    assert relative_error(cached(), right) < 1e-12

    @contextmanager
    def not_replayed(_):
        yield

    monkeypatch.setattr(RandomState, "replayed", not_replayed)
    assert relative_error(cached(), right) > 1e-3


def positions_that_go_on(monkeypatch):
    """A packed text's positions are counted from the beginning of the row."""

    def run(backbone, input_ids, packing, **options):
        going_on = torch.arange(input_ids.numel())[None] % 48
        return run_packed(backbone, input_ids, packing._replace(position_ids=going_on), **options)

    run_packed = encoder_module.run_packed
    monkeypatch.setattr(encoder_module, "run_packed", run)


def texts_that_see_each_other(monkeypatch):
    """Attention in a packed row knows no boundaries."""

    def attend(*arguments, packing=None, **options):
        whole = packing._replace(groups=(LengthGroup(1, packing.position_ids.numel()),))
        return packed_attention(*arguments, packing=whole, **options)

    packed_attention = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", attend)


def texts_merged_by_their_length(monkeypatch):
    """Texts count as identical if only their lengths are."""

    def merge(texts, num_pairs):
        zeros = Texts(np.zeros_like(texts.tokens), texts.lengths)
        found = distinct_texts(zeros, num_pairs)
        _, first = np.unique(found.numbers, return_index=True)
        starts = np.cumsum(texts.lengths) - texts.lengths
        kept = [texts.tokens[starts[i] :][: texts.lengths[i]].tolist() for i in first]
        return DistinctTexts(Texts.from_lists(kept), found.numbers)

    monkeypatch.setattr(largebatch.step.gradcache, "distinct_texts", merge)


def only_the_first_kept_chunk(monkeypatch):
    """The backward pass of what was kept stops after the first chunk."""

    def push(embeddings, gradients, *, last):
        backward(embeddings[:1], gradients[:1], last=last)

    backward = ddp.backward
    monkeypatch.setattr(ddp, "backward", push)


@pytest.mark.parametrize(
    "plant",
    [
        lambda _: None,
        positions_that_go_on,
        texts_that_see_each_other,
        texts_merged_by_their_length,
        only_the_first_kept_chunk,
    ],
)
def test_mistakes_in_chunks_are_seen(monkeypatch, plant):
    expected = full_batch_gradient(
        tiny_encoder(packing="off"), tiny_loss(symmetric=True), QUERIES, DOCUMENTS
    )[1]
    plant(monkeypatch)
    # An encoder takes its attention when it is made.
    encoder, loss = tiny_encoder(packing="on"), tiny_loss(symmetric=True)
    GradCache(encoder, loss, tokens_per_chunk=60, keep="all")(QUERIES, DOCUMENTS)
    is_wrong = plant.__name__ != "<lambda>"
    assert (relative_error(gradients(encoder, loss), expected) > 1e-3) == is_wrong
