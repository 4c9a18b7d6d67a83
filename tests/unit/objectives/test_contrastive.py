"""The contrastive objective: its plain call, its options of sources, and what it tells people."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics.reference import rank_batch

from largebatch.config import (
    DataConfig,
    LossOptions,
    ObjectiveConfig,
    SourceConfig,
    TemperatureConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.losses.temperature import Temperature
from largebatch.objectives.contrastive import ContrastiveLoss, build
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.objective import EmbeddedBatch, Facts, SourceNote

QUERIES, DOCUMENTS, NEGATIVES = [[5], [6], [7]], [[8], [9], [10]], [[11], [12], [9]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_call_gives_the_mean_and_the_gradient_of_the_temperature(symmetric):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    documents = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    loss = ContrastiveLoss(Temperature(0.4, learned=True), symmetric=symmetric).double()
    value = loss(queries, documents)
    value.backward()
    log_scale = loss.temperature.log_scale.detach().clone().requires_grad_()
    logits, targets = log_scale.exp() * queries @ documents.T, torch.arange(5)
    expected = F.cross_entropy(logits, targets)
    if symmetric:
        expected = (expected + F.cross_entropy(logits[:, :5].T, targets)) / 2
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(loss.temperature.log_scale.grad, log_scale.grad)
    assert abs(float(log_scale.grad)) > 1e-3


def test_too_few_documents():
    with pytest.raises(UserError, match="5 queries need a document each, got 4"):
        ContrastiveLoss()(torch.zeros(5, 2), torch.zeros(4, 2))


def config(**options):
    data = DataConfig(sources={"mine": SourceConfig(urls=["shards"])})
    return TrainConfig(data=data, **options)


def test_it_is_built_as_the_config_says():
    plain = build(config())
    assert (plain.symmetric, plain.mask_duplicates, plain.own_negatives) == (False, True, False)
    temperature = TemperatureConfig(value=0.2, learned=True, min=0.1, max=0.3)
    objective = ObjectiveConfig(symmetric=True, mask_duplicates=False, negatives="own")
    other = build(config(temperature=temperature, objective=objective))
    assert (other.symmetric, other.mask_duplicates, other.own_negatives) == (True, False, True)
    for wild, bound in ((9.0, 0.1), (-9.0, 0.3)):
        other.temperature.log_scale.data.fill_(wild)
        other.after_step()
        assert other.temperature.value == pytest.approx(bound)


def value_of(objective, options, *, counts=(1, 0, 2)):
    """Return what one rank's three pairs and three negatives give."""
    counts = None if counts is None else np.array(counts, np.int32)
    batch = rank_batch(QUERIES, DOCUMENTS, NEGATIVES, negative_counts=counts)
    pairs = Pairs.of(batch)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    gathered = objective.gathered_sides(options)
    columns = torch.cat([sides[("query", "document", "negative").index(side)] for side in gathered])
    facts = [Facts(3, 3, objective.knowledge(pairs))]
    value = objective.compute(
        EmbeddedBatch(
            *sides, pairs.negative_counts, columns, 0, facts, pairs, options, Collectives()
        )
    )
    return value, [*sides, gathered]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("asks", [None, "all", "own"])
def test_a_source_says_whose_its_negatives_are(own, asks):
    objective = ContrastiveLoss(Temperature(0.5), own_negatives=own, mask_duplicates=False)
    value, (queries, documents, negatives, gathered) = value_of(
        objective.double(), LossOptions(negatives=asks)
    )
    is_own = own if asks is None else asks == "own"
    assert gathered == (("document",) if is_own else ("document", "negative"))
    losses = []
    for row, mine in enumerate(([0], [], [1, 2])):
        further = negatives[mine] if is_own else negatives
        logits = 2 * torch.cat([documents, further]) @ queries[row]
        losses.append(logits.logsumexp(0) - logits[row])
    torch.testing.assert_close(value.loss, torch.stack(losses).mean())
    torch.testing.assert_close(value.own_share, value.loss)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("asks", [None, False, True])
def test_a_source_says_in_which_direction_it_is_matched(own, asks):
    loss = {
        symmetric: value_of(ContrastiveLoss(symmetric=symmetric).double(), LossOptions())[0].loss
        for symmetric in (False, True)
    }
    assert loss[False] != loss[True]
    objective = ContrastiveLoss(symmetric=own).double()
    found = value_of(objective, LossOptions(symmetric=asks))[0].loss
    assert found == loss[own if asks is None else asks]


@pytest.mark.parametrize("own", [False, True])
def test_what_is_masked_is_a_share_of_the_columns_that_there_are(own):
    """The last negative is the second document: of the third query, which has it, no false one."""
    objective = ContrastiveLoss(own_negatives=own).double()
    metrics = value_of(objective, LossOptions())[0].metrics
    # All: the second query is not contrasted with it. Own: it never would be.
    assert metrics["masked_share"] == (0 if own else 1 / (3 * 5))
    assert metrics["temperature"] == pytest.approx(0.05)
    # Now the negative belongs to the query whose document it is.
    metrics = value_of(objective, LossOptions(), counts=(0, 3, 0))[0].metrics
    assert metrics["masked_share"] == (1 / (3 * 2 + 3) if own else 1 / (3 * 5))


def test_own_negatives_need_to_be_someones():
    with pytest.raises(UserError, match="negatives=own needs to know whose each negative is"):
        value_of(ContrastiveLoss(own_negatives=True).double(), LossOptions(), counts=None)


@pytest.mark.parametrize(
    ("share", "none_left", "tells"),
    [
        (0.0, 0.0, False),
        (0.0, 1.0, False),  # a single pair
        (0.09, 0.0, False),
        (0.1, 0.0, True),
        (0.01, 0.01, True),
    ],
)
def test_many_masked_negatives_are_told(share, none_left, tells):
    metrics = {"masked_share": share, "without_negatives": none_left}
    sources = [SourceNote("one", False), SourceNote("two", True)]
    told = ContrastiveLoss().warning(metrics, sources)
    assert (told is not None) == tells
    if told is not None:
        assert "(source one, two)" in told
        assert "data.sources.two.mask_same_id=false" in told
        assert "data.sources.one" not in told


def test_negatives_that_score_too_high_are_told_apart():
    sources = [SourceNote("one", False)]
    usual = {"masked_share": 0.49, "masked_by_score": 0.45, "without_negatives": 0.0}
    assert ContrastiveLoss().warning(usual, sources) is None
    much = {"masked_share": 0.7, "masked_by_score": 0.6, "without_negatives": 0.0}
    assert "raise objective.mask_margin" in str(ContrastiveLoss().warning(much, sources))
