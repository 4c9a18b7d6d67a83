"""The same losses by sentence-transformers on the same tensors: values and gradients."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics.reference import rank_batch
from torch import nn

from largebatch.config import LossOptions
from largebatch.losses.temperature import Temperature
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.guide import GuideEmbeddings
from largebatch.step.matryoshka import Matryoshka
from largebatch.step.objective import EmbeddedBatch, Facts

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

B, D = 9, 8
ALL = ["query_document", "query_query", "document_query", "document_document"]


def unit(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def sides():
    """Return queries, documents near them, and a negative for each query."""
    queries = unit(B, D, 0)
    documents = F.normalize(queries + 0.7 * unit(B, D, 1), dim=1)
    negatives = F.normalize(queries + 1.3 * unit(B, D, 2), dim=1)
    return [one.requires_grad_() for one in (queries, documents, negatives)]


def ours(objective, leaves, *, negatives=True):
    """Return the loss of one rank that has all; no two texts are the same."""
    n = B if negatives else 0
    pairs = Pairs.of(
        rank_batch(
            [[5 + i] for i in range(B)],
            [[50 + i] for i in range(B)],
            [[90 + i] for i in range(n)],
            negative_counts=np.full(B, int(negatives), np.int32),
        )
    )
    objective = objective.double()
    objective.temperature.log_scale.fill_(math.log(4))  # not float32's
    parts = [leaves[0], leaves[1], leaves[2][:n]]
    gathered = objective.gathered_sides(LossOptions())
    named = dict(zip(("query", "document", "negative"), parts, strict=True))
    columns = torch.cat([named[side] for side in gathered]) if gathered else None
    facts = [Facts(B, n, objective.knowledge(pairs))]
    batch = EmbeddedBatch(
        *parts,
        pairs.negative_counts,
        columns,
        0,
        facts,
        pairs,
        LossOptions(),
        Collectives(),
    )
    return objective.compute(batch).own_share


def compare(mine, theirs, count=3):
    """Compare values and gradients of two functions of unit vectors, which theirs makes itself."""
    results = []
    for function in (mine, theirs):
        leaves = sides()
        value = function([F.normalize(leaf, dim=1) for leaf in leaves])
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves[:count])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


class Given(nn.Module):
    """A model whose embeddings are given."""

    def forward(self, features):
        return {"sentence_embedding": features["given"]}

    def get_embedding_dimension(self):
        return D


def mnrl(**options):
    return losses.MultipleNegativesRankingLoss(Given(), scale=4.0, **options)


def test_gte():
    theirs = mnrl(directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"))
    objective = ContrastiveLoss(Temperature(0.25), candidates=ALL, repeat_positive=True)
    compare(
        lambda leaves: ours(objective, leaves, negatives=False),
        lambda leaves: theirs.compute_loss_from_embeddings(leaves[:2], None),
        count=2,
    )


def test_both_directions_with_hard_negatives():
    """Hard negatives meet queries only."""
    theirs = mnrl(directions=("query_to_doc", "query_to_query", "doc_to_query"))
    objective = ContrastiveLoss(Temperature(0.25), candidates=ALL[:3], repeat_positive=True)
    compare(
        lambda leaves: ours(objective, leaves),
        lambda leaves: theirs.compute_loss_from_embeddings(leaves, None),
    )


@pytest.mark.parametrize(
    ("strategy", "margin", "options"),
    [
        ("absolute", 0.05, {"mask_margin": -0.05}),
        ("absolute", -0.03, {"mask_margin": 0.03}),
        ("relative", 0.2, {"mask_share": 0.8}),
    ],
)
@pytest.mark.parametrize("contrasts", [True, False])
# A higher margin than 0.03 would let theirs contrast a query with itself, where the guide scores
# its document that high.
def test_gist(strategy, margin, options, contrasts):
    theirs = losses.CachedGISTEmbedLoss.__new__(losses.CachedGISTEmbedLoss)
    nn.Module.__init__(theirs)  # its own wants two models with tokenizers
    vars(theirs).update(
        temperature=0.25,
        mini_batch_size=4,
        show_progress_bar=False,
        margin_strategy=strategy,
        margin=margin,
        contrast_anchors=contrasts,
        contrast_positives=contrasts,
        gather_across_devices=False,
    )
    theirs.similarity_fct = nn.CosineSimilarity(dim=-1)
    theirs.cross_entropy_loss = nn.CrossEntropyLoss()
    guided = [unit(B, 5, 3)]
    guided += [F.normalize(guided[0] + noise * unit(B, 5, 4), dim=1) for noise in (0.8, 1.2)]
    named = dict(zip(("query", "document", "negative"), guided, strict=True))
    objective = ContrastiveLoss(
        Temperature(0.25),
        candidates=["query_document", "query_query", "document_document"][: 3 if contrasts else 1],
        guide=SimpleNamespace(
            name="given",
            embed=lambda _, wanted: GuideEmbeddings(
                *guided, torch.cat([named[side] for side in named if side in wanted])
            ),
        ),
        **options,
    )
    peers = [[one] for one in guided]
    compare(
        lambda leaves: ours(objective, leaves),
        lambda leaves: theirs.calculate_loss([[one] for one in leaves], peers),
    )
    unmasked = ContrastiveLoss(Temperature(0.25), candidates=objective.candidates)
    leaves = [one.detach() for one in sides()]
    difference = ours(objective, leaves) - ours(unmasked, leaves)
    assert abs(float(difference)) > 1e-3  # something was masked


@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.2]])
def test_matryoshka(weights):
    inner = mnrl()
    theirs = losses.MatryoshkaLoss(inner.model, inner, [8, 4, 2], weights)
    made = Matryoshka.of([8, 4, 2], weights=weights or ())
    objective = ContrastiveLoss(Temperature(0.25), matryoshka=made)
    compare(
        lambda leaves: ours(objective, leaves),
        lambda leaves: theirs([{"given": leaf} for leaf in leaves], None),
    )


def test_hardness_of_other_documents():
    theirs = mnrl(hardness_mode="in_batch_negatives", hardness_strength=9.0)
    compare(
        lambda leaves: ours(ContrastiveLoss(hardness=9.0), leaves, negatives=False),
        lambda leaves: theirs.compute_loss_from_embeddings(leaves[:2], None),
        count=2,
    )
