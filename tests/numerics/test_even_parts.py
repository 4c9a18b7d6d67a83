"""Ranks that exchange pairs have the gradient of the full batch, and even work."""

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, whole_gradients
from numerics.reference import (
    gradients,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from numerics.uneven import (
    CASES,
    LAYOUTS,
    Case,
    encoder_of,
    model_on_rank,
    plain_gradient,
    texts_of,
)

from largebatch.batch import Texts
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.step import balance
from largebatch.step.balance import Pairs, exchange_pairs
from largebatch.step.gradcache import GradCache
from largebatch.step.hashes import id_hashes

CPU = torch.device("cpu")
NO_DROPOUT = [name for name, case in CASES.items() if not case.dropout]


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(CPU)


def gradient_on_rank(name, case, keep, plant=None):
    if plant is not None:
        plant()
    encoder, strategy, parts = model_on_rank(name, case, "packed")
    step = GradCache(
        encoder, strategy.modules["objective"], tokens_per_chunk=90, keep=keep, strategy=strategy
    )
    report = step.accumulate(rank_batch(*parts[:3], ids=parts[3]))
    given = sum(len(text) for side in parts[:3] for text in side)
    return float(report.loss), whole_gradients(strategy), given, report.work.num_tokens


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize(("case", "keep"), [*zip(NO_DROPOUT, ("none", "all"), strict=True)])
def test_gradient_is_that_of_the_full_batch(name, keep, case):
    value, expected = plain_gradient(CASES[case], "packed", True)
    found = run_ranks(gradient_on_rank, 2, name, CASES[case], keep)
    for loss, found_gradients, *_ in found:
        assert loss == pytest.approx(value, rel=TOLERANCES[name])
        assert relative_error(found_gradients, expected) < TOLERANCES[name]
    given, embedded = ([one[place] for one in found] for place in (2, 3))
    assert sum(given) == sum(embedded)
    assert max(given) > 1.3 * min(given)
    assert max(embedded) < 1.1 * min(embedded)


def with_dropout(exchange_first):
    """Take a step on the same parts, which ranks exchange in the step or had before it."""
    case = CASES["longer, one way, cls, dropout"]
    rank = Collectives().world.rank
    queries, documents, negatives, ids = texts_of(LAYOUTS[case.layout][rank])
    sides = map(Texts.from_lists, (queries, documents, negatives))
    pairs = Pairs(*sides, negative_counts=None, id_hashes=id_hashes(ids))
    encoder, loss = encoder_of(case, "padded"), tiny_loss(symmetric=case.symmetric)
    if exchange_first:
        pairs = exchange_pairs(pairs, Collectives())
    step = GradCache(encoder, loss, tokens_per_chunk=90, balance=not exchange_first)
    torch.manual_seed(100 + rank)
    report = step.accumulate(rank_batch(*pairs[:3]))
    return float(report.loss), gradients(encoder, loss)


def test_dropout_is_that_of_the_exchanged_parts():
    before, within = (run_ranks(with_dropout, 2, first) for first in (True, False))
    for (loss, found), (other, others) in zip(before, within, strict=True):
        assert loss == other
        for name, gradient in found.items():
            np.testing.assert_array_equal(gradient, others[name], err_msg=name)


def documents_change_places():
    """The pairs of a message get each other's documents."""
    plain = balance._read

    def read(*arguments):
        pairs = plain(*arguments)
        backwards = np.arange(pairs.documents.num_texts)[::-1]
        return pairs._replace(documents=pairs.documents.take(backwards))

    balance._read = read


def givers_keep_what_they_gave():
    """A pair that has moved is embedded on both ranks."""
    plain = balance.exchange_pairs

    def exchange(pairs, collectives):
        new = plain(pairs, collectives)
        lost = pairs.queries.num_texts > new.queries.num_texts
        return Pairs.concatenate([new, pairs.take(np.array([0]))]) if lost else new

    balance.exchange_pairs = exchange


def ids_stay_behind():
    """Pairs that have moved are all of one record."""
    plain = balance._read
    balance._read = lambda *arguments: plain(*arguments)._replace(
        id_hashes=0 * plain(*arguments).id_hashes
    )


@pytest.mark.parametrize(
    "plant", [documents_change_places, givers_keep_what_they_gave, ids_stay_behind]
)
def test_planted_mistakes_are_found(plant):
    case = Case("empty", True, "mean", 0.0)
    value, expected = plain_gradient(case, "packed", True)
    for planted in (None, plant):
        found = run_ranks(gradient_on_rank, 2, "ddp", case, "none", planted)
        errors = [
            max(abs(loss / value - 1), relative_error(found_gradients, expected))
            for loss, found_gradients, *_ in found
        ]
        assert [error > 1e-3 for error in errors] == [planted is not None] * 2
        assert planted or max(errors) < 1e-6
