"""Planted duplicates over several ranks: none is counted, in value, accuracy and every gradient."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from collective_counts import counted
from dist import run_ranks
from numerics.reference import (
    embed,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.batch import Texts
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.infonce import info_nce
from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.gradcache import GradCache
from largebatch.step.hashes import id_hashes, text_hashes
from largebatch.step.objective import EmbeddedBatch
from largebatch.world import part_of_rank

NUM_PAIRS, NUM_NEGATIVES, WIDTH = 14, 7, 5


def planted():
    """Return queries, documents, negatives and ids, with one duplicate of each kind."""
    queries = random_texts(NUM_PAIRS, longest=9, seed=1)
    documents = random_texts(NUM_PAIRS, longest=30, seed=2)
    negatives = random_texts(NUM_NEGATIVES, longest=20, seed=3)
    ids = [f"source/{row}" for row in range(NUM_PAIRS)]
    documents[9] = documents[0]  # the same document, on another rank
    queries[12] = queries[1]  # the same query with another document
    documents[5] = documents[12]  # ... which is a third query's, too
    negatives[6] = documents[2]  # a hard negative that is a document
    negatives[3] = queries[7]  # ... and one that is a query
    queries[13], documents[13], ids[13] = queries[3], documents[3], ids[3]  # a record twice
    ids[8] = ids[4]  # a record twice, with other texts
    documents[6] = queries[6]  # a query that is its own document
    return queries, documents, negatives, ids


def embeddings():
    """Return unit vectors, documents near their queries; equal texts have near equal ones."""
    generator = torch.Generator().manual_seed(0)
    queries, documents, negatives = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in (NUM_PAIRS, NUM_PAIRS, NUM_NEGATIVES)
    )
    rows = torch.nn.functional.normalize(torch.cat([queries, queries + documents, negatives]))
    first: dict[tuple[int, ...], int] = {}
    texts = [text for side in planted()[:3] for text in side]
    same = [first.setdefault(tuple(text), row) for row, text in enumerate(texts)]
    # But for a little noise, as from dropout, so that no two logits tie.
    rows = rows[same] + 0.01 * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    return [side.clone() for side in rows.split([NUM_PAIRS, NUM_PAIRS, NUM_NEGATIVES])]


def planted_mask():
    """Return which columns are no negatives of which query, without hashes."""
    queries, documents, negatives, ids = planted()
    columns = [*documents, *negatives]
    mask = torch.zeros(NUM_PAIRS, len(columns), dtype=torch.bool)
    for row in range(NUM_PAIRS):
        answers = [
            queries[other] == queries[row] or ids[other] == ids[row] for other in range(NUM_PAIRS)
        ]
        relevant = [queries[row], *itertools.compress(documents, answers)]
        for column, text in enumerate(columns):
            mask[row, column] = column != row and text in relevant
    return mask


def masked_loss(queries, columns, scale, mask, *, symmetric):
    """Return the mean loss with the whole matrix, and the logits."""
    logits = (scale * queries @ columns.T).masked_fill(mask, -torch.inf)
    targets = torch.arange(NUM_PAIRS)
    value = torch.nn.functional.cross_entropy(logits, targets)
    if symmetric:
        backwards = torch.nn.functional.cross_entropy(logits[:, :NUM_PAIRS].T, targets)
        value = (value + backwards) / 2
    return value, logits


def reference(*, symmetric, masked=True):
    """Return mean loss, accuracy, mask and gradients, with the whole matrix and no hashes."""
    mask = planted_mask() & masked
    leaves = [t.requires_grad_() for t in embeddings()]
    loss = tiny_loss(symmetric=symmetric)
    value, logits = masked_loss(
        leaves[0], torch.cat(leaves[1:]), loss.temperature(), mask, symmetric=symmetric
    )
    value.backward()
    gradients = [*(leaf.grad for leaf in leaves), loss.temperature.log_scale.grad]
    accuracy = (logits.argmax(1) == torch.arange(NUM_PAIRS)).double().mean()
    return float(value.detach()), float(accuracy), mask, gradients


def parts_of_rank(rank, size):
    rows = part_of_rank(NUM_PAIRS, rank, size)
    # Some ranks have no hard negatives, and on 16 ranks some have nothing at all.
    further = part_of_rank(NUM_NEGATIVES, rank, size)
    return rows, rows, further


def pairs_of(queries, documents, negatives, ids):
    """Return token lists and ids, or None, as a rank's pairs."""
    sides = map(Texts.from_lists, (queries, documents, negatives))
    return Pairs(*sides, negative_counts=None, id_hashes=None if ids is None else id_hashes(ids))


def tell(objective, collectives, pairs):
    """Return what ranks tell each other in a step."""
    step = SimpleNamespace(objective=objective, collectives=collectives)
    return GradCache._exchange_facts(step, pairs, 0, 0)


def objective_on_rank(symmetric, mask_duplicates=True, steps=1, with_ids=True):
    """Return loss, accuracy, gradients of this rank's rows, the shares of negatives that are masked
    and of queries that have none, and the collectives of each step."""
    collectives = Collectives()
    world = collectives.world
    objective = ContrastiveLoss(
        tiny_loss(symmetric=False).temperature, symmetric=symmetric, mask_duplicates=mask_duplicates
    )
    log_scale = objective.temperature.log_scale
    parts = parts_of_rank(world.rank, world.size)
    queries, documents, negatives, ids = planted()
    pairs = pairs_of(
        *(
            [texts[row] for row in rows]
            for texts, rows in zip((queries, documents, negatives), parts, strict=True)
        ),
        [ids[row] for row in parts[0]] if with_ids else None,
    )
    leaves = [
        whole[rows.start : rows.stop].clone().requires_grad_()
        for whole, rows in zip(embeddings(), parts, strict=True)
    ]
    per_step = []
    for _ in range(steps):
        for leaf in (*leaves, log_scale):
            leaf.grad = None
        with counted() as calls:
            facts = tell(objective, collectives, pairs).facts
            counts = [one.num_pairs + one.num_negatives for one in facts]
            gathered_md = collectives.gather_rows(torch.cat(leaves[1:]), counts).rows
            first = sum(counts[: world.rank])
            value = objective.compute(
                EmbeddedBatch(
                    *leaves, None, gathered_md, first, facts, pairs, LossOptions(), collectives
                )
            )
            value.own_share.backward()
        per_step.append(list(calls))
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return (
        float(value.loss),
        float(value.metrics["accuracy"]),
        [*gradients, log_scale.grad],
        tuple(float(value.metrics[name]) for name in ("masked_share", "without_negatives")),
        per_step,
    )


def run(size, *args):
    return [objective_on_rank(*args)] if size == 1 else run_ranks(objective_on_rank, size, *args)


def difference(results, expected):
    """Return the largest error of value, accuracy and gradients."""
    size = len(results)
    value, accuracy, _, gradients = expected
    errors = [abs(found[0] - value) for found in results]
    errors += [abs(found[1] - accuracy) for found in results]
    sides = list(zip(*(found[2] for found in results), strict=True))
    for ranks, side in zip(sides[:3], gradients[:3], strict=True):
        # Strategies average over ranks: a row's gradient stands on one of them only.
        whole = np.concatenate([np.asarray(part) for part in ranks]) / size
        errors.append(np.abs(whole - side.numpy()).max())
    errors.append(abs(np.mean([float(part) for part in sides[3]]) - float(gradients[3])))
    return max(errors)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_planted_duplicates_are_not_counted(size, symmetric):
    expected = reference(symmetric=symmetric)
    results = run(size, symmetric)
    assert difference(results, expected) < 1e-12
    assert expected[2].sum() > 12
    candidates = NUM_PAIRS * (NUM_PAIRS + NUM_NEGATIVES - 1)
    for *_, shares, _ in results:
        assert shares == (pytest.approx(int(expected[2].sum()) / candidates), 0)
    # The comparison would see them: without masks it is another loss.
    unmasked = run(size, symmetric, False)
    assert unmasked[-1][3] == (0, 0)
    assert difference(unmasked, expected) > 1e-2
    assert difference(unmasked, reference(symmetric=symmetric, masked=False)) < 1e-12
    # Nor would it miss what the ids alone tell.
    assert difference(run(size, symmetric, True, 1, False), expected) > 1e-3


def cached_gradient(symmetric, mask_duplicates):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=symmetric)
    loss.mask_duplicates = mask_duplicates
    world = Collectives().world
    queries, documents, negatives, ids = planted()
    rows, _, further = parts_of_rank(world.rank, world.size)
    report = GradCache(encoder, loss, tokens_per_chunk=40, balance=False).accumulate(
        rank_batch(
            [queries[row] for row in rows],
            [documents[row] for row in rows],
            [negatives[row] for row in further],
            ids=[ids[row] for row in rows],
        )
    )
    return float(report.loss), gradients(encoder, loss)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_cached_step_does_not_count_them(symmetric):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=symmetric)
    queries, documents, negatives, _ = planted()
    value, _ = masked_loss(
        embed(encoder, queries),
        embed(encoder, [*documents, *negatives]),
        loss.temperature(),
        planted_mask(),
        symmetric=symmetric,
    )
    value.backward()
    expected = gradients(encoder, loss)
    for found_value, found in run_ranks(cached_gradient, 4, symmetric, True):
        assert found_value == pytest.approx(float(value.detach()), rel=1e-12)
        assert relative_error(found, expected) < 1e-9
    for _, found in run_ranks(cached_gradient, 4, symmetric, False):
        assert relative_error(found, expected) > 1e-2


def test_each_kind_of_duplicate_is_planted():
    _, _, mask, _ = reference(symmetric=False)
    for row, column in [(0, 9), (1, 12), (1, 5), (2, 20), (7, 17), (3, 13), (4, 8), (8, 4)]:
        assert mask[row, column]
    assert not mask[6, 6]


def test_accuracy_leaves_out_what_is_masked():
    """A query that occurs twice would otherwise lose to its other document."""
    (_, masked_accuracy, *_), (_, accuracy, *_) = (
        reference(symmetric=False, masked=masked) for masked in (True, False)
    )
    assert masked_accuracy > accuracy


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tile", [5, 64])
def test_gradcheck_with_masks(tile, symmetric):
    queries, documents, negatives, ids = planted()
    sides = map(text_hashes, map(Texts.from_lists, (queries, documents, negatives)))
    hashes = PairHashes(*sides, ids=id_hashes(ids))
    masks = FalseNegatives([hashes], rank=0, device=torch.device("cpu"))
    rows, *columns = embeddings()
    leaves = [rows, torch.cat(columns), torch.tensor(1.7, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, d, s: info_nce(
            q, d, torch.arange(NUM_PAIRS), s,
            symmetric=symmetric, false_negatives=masks, tile=tile,
        ).loss_sum,
        [leaf.requires_grad_() for leaf in leaves],
    )  # fmt: skip


@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_collectives_of_a_step(monkeypatch, symmetric, masks, tile):
    """One gather of numbers, one of rows, one reduce-scatter; one or two small reductions."""
    monkeypatch.setitem(info_nce.__kwdefaults__, "tile", tile)
    for *_, steps in run_ranks(objective_on_rank, 2, symmetric, masks, 3):
        first, *others = steps
        for names in others:
            assert names == [
                "_allgather_base_",
                "_allgather_base_",
                *["allreduce_"] * (2 if symmetric else 1),
                "_reduce_scatter_base_",
            ]
        # Only the first step's hashes need a second round, for there was no room for them yet.
        assert len(first) == len(others[0]) + masks


def different_knowledge():
    collectives = Collectives()
    texts = [[5 + collectives.world.rank]]
    pairs = pairs_of(texts, texts, texts, ["a"] if collectives.world.rank else None)
    tell(ContrastiveLoss(), collectives, pairs)


def test_ranks_must_know_alike():
    with pytest.raises(AssertionError, match="ranks know different things"):
        run_ranks(different_knowledge, 2)


def no_pairs():
    with pytest.raises(UserError, match="no pairs"):
        tell(ContrastiveLoss(), Collectives(), pairs_of([], [], [], None))
    return True


def test_no_pairs_at_all():
    assert all(run_ranks(no_pairs, 2))
