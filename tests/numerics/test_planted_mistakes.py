"""Mistakes that distributed trainers make must turn the comparison of test_gradient.py red."""

from contextlib import contextmanager

import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    full_batch_gradient,
    gradients,
    random_texts,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

import largebatch.objective
from largebatch.gradcache import GradCache, RandomState
from largebatch.parallel import collectives, ddp
from largebatch.world import part_of_rank

NUM_PAIRS = 13
QUERIES = random_texts(NUM_PAIRS, longest=9, seed=1)
DOCUMENTS = random_texts(NUM_PAIRS, longest=30, seed=2)


def lose_world_size_factor():
    """The loss is divided by all rows, and then averaged over ranks once more."""
    plain = largebatch.objective.ContrastiveObjective.__call__

    def call(self, *embeddings):
        value = plain(self, *embeddings)
        return value._replace(rank_loss=value.rank_loss / self.collectives.world.size)

    largebatch.objective.ContrastiveObjective.__call__ = call


def drop_other_ranks_rows():
    """The gather's backward returns this rank's own gradient, without the other ranks' share."""

    def backward(ctx, grad):
        return grad.split(ctx.counts)[ctx.rank], None, None

    collectives._GatherRows.backward = staticmethod(backward)


def average_over_unequal_parts():
    """Each rank takes the mean over its own rows, however many they are."""
    plain = largebatch.objective.ContrastiveObjective.__call__

    def call(self, queries, documents, negatives):
        value = plain(self, queries, documents, negatives)
        right = NUM_PAIRS / self.collectives.world.size
        return value._replace(rank_loss=value.rank_loss * right / len(queries))

    largebatch.objective.ContrastiveObjective.__call__ = call


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
