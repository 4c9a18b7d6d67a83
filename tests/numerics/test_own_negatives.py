"""Negatives that belong to one query: the loss and every gradient, and where they go."""

import numpy as np
import pytest
import torch
from all_pairs import combined
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    embed,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.batch import RankBatch, Texts
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.infonce import info_nce
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs, exchange_pairs
from largebatch.step.gradcache import GradCache

COUNTS = np.array([0, 2, 1, 0, 4, 1, 0, 0, 3, 1, 1, 0, 2])
OWNERS = np.repeat(np.arange(NUM_PAIRS), COUNTS)
NEGATIVES = random_texts(int(COUNTS.sum()), longest=20, seed=9)
# One is the document of its own query, a false one; another is the document of somebody else.
NEGATIVES[0], NEGATIVES[4] = DOCUMENTS[1], DOCUMENTS[11]
MASKED = np.arange(len(NEGATIVES)) == 0
LAYOUTS = {1: [0, 13], 2: [0, 9, 13], 3: [0, 4, 4, 13]}


def plain_loss(queries, documents, negatives, scale, *, symmetric):
    """Return the mean loss, row by row as the formula says."""
    losses = []
    logits = scale * queries @ documents.T
    for row in range(NUM_PAIRS):
        own = [n for n in np.flatnonzero(row == OWNERS) if not MASKED[n]]
        others = torch.cat([logits[row], scale * negatives[own] @ queries[row]])
        losses.append(others.logsumexp(0) - logits[row, row])
        if symmetric:
            back = logits[:, row].logsumexp(0) - logits[row, row]
            losses[-1] = (losses[-1] + back) / 2
    return torch.stack(losses).mean()


def expected(symmetric):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=symmetric)
    value = plain_loss(
        embed(encoder, QUERIES),
        embed(encoder, DOCUMENTS),
        embed(encoder, NEGATIVES),
        loss.temperature(),
        symmetric=symmetric,
    )
    value.backward()
    return float(value.detach()), gradients(encoder, loss)


def batch_of(rank, size, **others):
    rows = range(*LAYOUTS[size][rank : rank + 2])
    own = [n for n, owner in enumerate(OWNERS) if owner in rows]
    return rank_batch(
        [QUERIES[i] for i in rows],
        [DOCUMENTS[i] for i in rows],
        [NEGATIVES[n] for n in own],
        negative_counts=COUNTS[list(rows)],
        **others,
    )


def on_rank(symmetric, balance, by_source):
    world = Collectives().world
    encoder = tiny_encoder()
    loss = tiny_loss(symmetric=symmetric)
    loss.own_negatives = not by_source
    options = LossOptions(negatives="own" if by_source else None)
    step = GradCache(encoder, loss, tokens_per_chunk=60, balance=balance)
    report = step.accumulate(batch_of(world.rank, world.size, loss_options=options))
    return float(report.loss), gradients(encoder, loss), float(report.metrics["masked_share"])


@combined(
    world_size=[1, 2, 3], symmetric=[False, True], balance=[True, False], by_source=[True, False]
)
def test_the_gradient_is_that_of_the_formula(world_size, symmetric, balance, by_source):
    value, wanted = expected(symmetric)
    for loss, found, masked in run_ranks(on_rank, world_size, symmetric, balance, by_source):
        assert loss == pytest.approx(value, rel=1e-9)
        assert relative_error(found, wanted) < 1e-6
        assert masked == pytest.approx(1 / (NUM_PAIRS * (NUM_PAIRS - 1) + len(NEGATIVES)))


def exchanged():
    world = Collectives().world
    pairs = exchange_pairs(Pairs.of(batch_of(world.rank, world.size)), Collectives())
    assert pairs.negative_counts is not None
    starts = np.concatenate([[0], np.cumsum(pairs.negative_counts)])

    def text(side, row):
        return tuple(side.take(np.array([row])).tokens.tolist())

    return {
        text(pairs.queries, row): [
            text(pairs.negatives, n) for n in range(starts[row], starts[row + 1])
        ]
        for row in range(pairs.queries.num_texts)
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_negatives_move_with_their_query(world_size):
    found = run_ranks(exchanged, world_size)
    sizes = np.diff(LAYOUTS[world_size])
    assert [len(part) for part in found] != sizes.tolist(), "nothing moved"
    wanted = {
        tuple(query): [tuple(NEGATIVES[n]) for n in np.flatnonzero(row == OWNERS)]
        for row, query in enumerate(QUERIES)
    }
    assert {query: own for part in found for query, own in part.items()} == wanted


def test_whose_a_negative_is_must_be_known():
    step = GradCache(tiny_encoder(), ContrastiveLoss(own_negatives=True))
    with pytest.raises(UserError, match="negatives=own needs to know whose each negative is"):
        step(QUERIES, DOCUMENTS, NEGATIVES)
    step(QUERIES, DOCUMENTS)  # there are none


def test_rows_without_any_negative_are_counted():
    one = [Texts.from_lists([[5, 6]]), Texts.from_lists([[7]])]
    step = GradCache(tiny_encoder(), ContrastiveLoss(own_negatives=True))
    alone = step.accumulate(RankBatch(*one, Texts.from_lists([]), np.array([0])))
    assert float(alone.metrics["without_negatives"]) == 1
    assert float(alone.loss) == 0
    with_one = step.accumulate(RankBatch(*one, Texts.from_lists([[8, 9]]), np.array([1])))
    assert float(with_one.metrics["without_negatives"]) == 0
    assert float(with_one.loss) > 0


def test_own_negatives_are_none_of_the_columns():
    """A planted mistake of the proof above: were they columns, the loss would be another."""
    encoder = tiny_encoder()
    queries, documents = embed(encoder, QUERIES).detach(), embed(encoder, DOCUMENTS).detach()
    negatives = embed(encoder, NEGATIVES).detach()
    scale = torch.tensor(5.0, dtype=torch.float64)
    own = plain_loss(queries, documents, negatives, scale, symmetric=False)
    columns = torch.cat([documents, negatives])
    shared = info_nce(queries, columns, torch.arange(NUM_PAIRS), scale).loss_sum / NUM_PAIRS
    assert float(shared - own) > 0.01
