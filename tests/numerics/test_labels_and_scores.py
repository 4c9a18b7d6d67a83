"""Objectives of a teacher's scores, of labels and of all pairs, through the cached step.

Value and gradients of the weights are those of plain autograd over the whole batch, one text at a
time, on 1, 2 and 3 ranks with uneven parts. Mistakes that such objectives invite turn the
comparison red.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
)

from largebatch.batch import Scores
from largebatch.losses.temperature import Temperature
from largebatch.objectives import sts
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.objectives.distill import Distillation
from largebatch.objectives.match import EmbeddingMatch
from largebatch.objectives.sigmoid import SigmoidLoss
from largebatch.objectives.sts import SimilarityOrder
from largebatch.parallel import collectives as collectives_module
from largebatch.step import balance as balance_module
from largebatch.step.balance import Pairs
from largebatch.step.gradcache import GradCache
from largebatch.step.guide import Guide

# 0 to 3 negatives of a pair; the second negative of pair 5 is the document of pair 2, and pairs 4
# and 9 have one document: false negatives for who looks at the whole batch.
COUNTS = np.array([(3 * row) % 4 for row in range(NUM_PAIRS)])
NEGATIVES = random_texts(int(COUNTS.sum()), longest=20, seed=7)
NEGATIVES[int(COUNTS[:5].sum()) + 1] = DOCUMENTS[2]
DOCUMENTS = [*DOCUMENTS[:9], DOCUMENTS[4], *DOCUMENTS[10:]]
# Fractions and ties.
LABELS = np.array([0.5, 3.0, 1.0, 5.0, 3.0, 0.0, 1.0, 4.5, 2.0, 3.0, 5.0, 0.25, 1.0]) / 5
RNG = np.random.default_rng(3)
SCORES = Scores(RNG.normal(size=NUM_PAIRS) * 2, RNG.normal(size=len(NEGATIVES)) * 2)
ENDS = {1: [0, NUM_PAIRS], 2: [0, 4, NUM_PAIRS], 3: [0, 3, 3, NUM_PAIRS]}  # a rank without a row
KINDS = ("sigmoid", "kl", "kl_t2", "margin_mse", "simlm", "match", "cosent", "angle")


def made(kind, packing="off"):
    encoder = tiny_encoder(packing=packing)
    contrastive = ContrastiveLoss(Temperature(0.3, learned=True))
    objective = {
        "sigmoid": lambda: SigmoidLoss(4.0, -1.0),
        "kl": lambda: Distillation(contrastive, teacher_temperature=1.5),
        "kl_t2": lambda: Distillation(contrastive, scale_by_t2=True),
        "margin_mse": lambda: Distillation(
            ContrastiveLoss(), kind="margin_mse", contrastive_weight=0.0
        ),
        "simlm": lambda: Distillation(contrastive, contrastive_weight=0.2),
        "match": lambda: EmbeddingMatch(contrastive, frozen_teacher(), contrastive_weight=0.5),
        "cosent": lambda: SimilarityOrder("cosent", 5.0),
        "angle": lambda: SimilarityOrder("angle", 5.0),
    }[kind]()
    return encoder, objective.to(torch.float64)


def frozen_teacher():
    return Guide(tiny_encoder(seed=5), tokens_per_chunk=40)


def masked_columns():
    """Return what the batch itself shows to be no negatives, row by row."""
    columns = [*DOCUMENTS, *NEGATIVES]
    known = {(tuple(q), tuple(d)) for q, d in zip(QUERIES, DOCUMENTS, strict=True)}
    known |= {(tuple(q), tuple(q)) for q in QUERIES}
    mask = torch.zeros(NUM_PAIRS, len(columns), dtype=torch.bool)
    for row, query in enumerate(QUERIES):
        for column, text in enumerate(columns):
            mask[row, column] = row != column and (tuple(query), tuple(text)) in known
    return mask


def plain_loss(kind, objective, queries, documents, negatives):
    columns, mask = torch.cat([documents, negatives]), masked_columns()
    assert mask.sum() == 3
    own = torch.arange(NUM_PAIRS)
    if kind == "sigmoid":
        logits = objective.log_scale.exp() * queries @ columns.T + objective.bias
        signs = -torch.ones_like(logits)
        signs[own, own] = 1
        return -F.logsigmoid(signs * logits).masked_fill(mask, 0).sum() / NUM_PAIRS
    if kind in ("cosent", "angle"):
        s = torch.cosine_similarity(queries, documents)
        if kind == "angle":
            (a, b), (c, d) = queries.chunk(2, 1), documents.chunk(2, 1)
            s = (((a * c + b * d) + (b * c - a * d)).sum(1)).abs()
            s = s / queries.norm(dim=1) / documents.norm(dim=1)
        labels = torch.from_numpy(LABELS)
        differences = 5.0 * (s[:, None] - s[None, :])
        return torch.log1p(differences[labels[:, None] < labels[None, :]].exp().sum())
    if kind == "match":
        with torch.no_grad():
            told = [embed(frozen_teacher().encoder, texts) for texts in (QUERIES, DOCUMENTS)]
        distances = (queries - told[0]).square().sum(1) + (documents - told[1]).square().sum(1)
        logits = objective.contrastive.temperature() * queries @ columns.T
        contrast = F.cross_entropy(logits.masked_fill(mask, -torch.inf), own)
        return distances.mean() / 2 + 0.5 * contrast
    total, first = 0.0, 0
    for row, count in enumerate(COUNTS.tolist()):
        texts = torch.cat([documents[row : row + 1], negatives[first : first + count]])
        student = texts @ queries[row]
        teacher = torch.from_numpy(
            np.concatenate([SCORES.documents[row : row + 1], SCORES.negatives[first:][:count]])
        )
        first += count
        if kind == "margin_mse":
            errors = (student[0] - student[1:]) - (teacher[0] - teacher[1:])
            total = total + errors.square().sum() / max(count, 1)
            continue
        share = (teacher / objective.teacher_temperature).softmax(0)
        logits = objective.contrastive.temperature() * student
        one = (share * (share.log() - logits.log_softmax(0))).sum()
        squared = objective.contrastive.temperature().detach() ** -2
        total = total + one * (squared if kind == "kl_t2" else 1)
    loss = total / NUM_PAIRS
    if kind == "simlm":
        logits = objective.contrastive.temperature() * queries @ columns.T
        logits = logits.masked_fill(mask, -torch.inf)
        loss = loss + 0.2 * F.cross_entropy(logits, own)
    return loss


def plain(kind):
    encoder, objective = made(kind)
    sides = [embed(encoder, texts) for texts in (QUERIES, DOCUMENTS, NEGATIVES)]
    value = plain_loss(kind, objective, *sides)
    value.backward()
    return float(value.detach()), gradients(encoder, objective)


def batch_of(rows, *, scores=SCORES):
    starts = np.concatenate([[0], np.cumsum(COUNTS)])
    own = slice(int(starts[rows.start]), int(starts[rows.stop]))
    at = slice(rows.start, rows.stop)
    return rank_batch(
        QUERIES[at],
        DOCUMENTS[at],
        NEGATIVES[own],
        negative_counts=COUNTS[at].astype(np.int32),
        scores=Scores(scores.documents[at], scores.negatives[own]),
        labels=LABELS[at],
    )


def on_rank(kind, keep, packing, balance, plant=None, scores=SCORES):
    if plant is not None:
        plant()
    encoder, objective = made(kind, packing)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ends = ENDS[size]
    step = GradCache(encoder, objective, tokens_per_chunk=50, keep=keep, balance=balance)
    report = step.accumulate(batch_of(range(ends[rank], ends[rank + 1]), scores=scores))
    return float(report.loss), gradients(encoder, objective), dict(report.metrics)


@combined(
    kind=KINDS,
    world_size=(1, 2, 3),
    keep=("none", "all"),
    packing=("off", "on"),
    balance=(True, False),
)
def test_the_gradient_is_that_of_plain_autograd(kind, world_size, keep, packing, balance):
    loss, expected = plain(kind)
    results = run_ranks(on_rank, world_size, kind, keep, packing, balance)
    for value, found, metrics in results:
        assert value == pytest.approx(loss, rel=1e-10)
        assert relative_error(found, expected) < 1e-9
        assert metrics == results[0][2]


def test_the_parts_of_a_loss_are_reported_and_weigh_alike_on_any_number_of_ranks():
    seen = [run_ranks(on_rank, size, "simlm", "none", "off", False)[0] for size in (1, 2, 3)]
    for loss, _, metrics in seen:
        whole = metrics["distillation_loss"] + 0.2 * metrics["contrastive_loss"]
        assert loss == pytest.approx(float(whole), rel=1e-12)
        for name in ("distillation_loss", "contrastive_loss", "agreement", "accuracy"):
            assert metrics[name] == pytest.approx(float(seen[0][2][name]), rel=1e-10)


def test_metrics_of_the_sigmoid_loss():
    ((_, _, metrics),) = run_ranks(on_rank, 1, "sigmoid", "none", "off", False)
    possible = NUM_PAIRS * (NUM_PAIRS + len(NEGATIVES) - 1)
    assert metrics["masked_share"] == pytest.approx(3 / possible)
    assert (metrics["scale"], metrics["bias"]) == (pytest.approx(4.0), -1.0)


def nothing():
    """Plant no mistake."""


def labels_that_stay():
    """Pairs move to another rank, and their labels do not follow them."""
    plain_take = Pairs.take

    def take(self, loads):
        taken = plain_take(self, loads)
        own = self.labels[: len(taken.labels)]
        return taken._replace(labels=own.copy())

    Pairs.take = take


def scores_that_stay():
    """Pairs move to another rank, and their negatives' scores do not follow them."""
    plain_take = Pairs.take

    def take(self, loads):
        taken = plain_take(self, loads)
        own = self.scores.negatives[: len(taken.scores.negatives)].copy()
        return taken._replace(scores=taken.scores._replace(negatives=own))

    Pairs.take = take


def labels_as_integers():
    """The message between ranks cuts the fractions off."""
    read = balance_module._read

    def cut(message, are_pairs, known):
        pairs = read(message, are_pairs, known)
        return pairs._replace(labels=np.floor(pairs.labels))

    balance_module._read = cut


def the_first_columns_are_mine():
    """A rank's documents are taken for the first of all ranks."""
    plain_compute = SigmoidLoss.compute
    SigmoidLoss.compute = lambda self, batch: plain_compute(self, batch._replace(first_gathered=0))


def a_rank_orders_its_own_pairs():
    """Pairs are compared with those of the same rank only."""
    plain_compute = SimilarityOrder.compute

    def compute(self, batch):
        alone = batch._replace(
            facts=[batch.facts[batch.collectives.world.rank]], collectives=_Alone(batch.collectives)
        )
        return plain_compute(self, alone)

    SimilarityOrder.compute = compute


class _Alone:
    def __init__(self, real):
        self.world = real.world

    def gather_rows(self, rows, counts):
        return collectives_module.Gathered(rows, counts)


def a_mean_over_rows():
    """CoSENT is back-propagated as if it were a mean over rows."""
    plain_compute = SimilarityOrder.compute

    def compute(self, batch):
        value = plain_compute(self, batch)
        return value._replace(own_share=batch.own_share(value.own_share))

    SimilarityOrder.compute = compute


def ties_count():
    """Pairs with the same label are ordered by where they stand."""
    plain_of = sts.LabelOrder.of
    sts.LabelOrder.of = staticmethod(
        lambda labels, device: plain_of(labels + 1e-9 * np.arange(len(labels)), device)
    )


@pytest.mark.parametrize(
    ("kind", "plant", "is_wrong"),
    [
        *((kind, nothing, False) for kind in ("cosent", "kl", "sigmoid")),
        ("cosent", labels_that_stay, True),
        ("cosent", labels_as_integers, True),
        ("cosent", a_rank_orders_its_own_pairs, True),
        ("cosent", a_mean_over_rows, True),
        ("cosent", ties_count, True),
        ("kl", scores_that_stay, True),
        ("sigmoid", the_first_columns_are_mine, True),
    ],
)
def test_the_comparison_sees_it(kind, plant, is_wrong):
    _, expected = plain(kind)
    found = run_ranks(on_rank, 3, kind, "none", "off", True, plant)
    errors = [relative_error(one, expected) for _, one, _ in found]
    assert (max(errors) > 1e-3) == is_wrong


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_teachers_row_that_is_shifted_by_one_is_seen(kind):
    _, expected = plain(kind)
    shifted = Scores(np.roll(SCORES.documents, 1), SCORES.negatives)
    ((_, found, _),) = run_ranks(on_rank, 1, kind, "none", "off", False, None, shifted)
    assert relative_error(found, expected) > 1e-3
