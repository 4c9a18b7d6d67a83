"""Semantic textual similarity: pairs of the global batch are to be ordered as their labels are.

What is compared is pairs with pairs, all with all, so each rank needs the similarity of every
pair: one number each, whatever the width.

Shapes: b pairs of this rank, N pairs of all ranks, d embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from largebatch.batch import Int64Array
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.cosent import LabelOrder, angle_similarities, cosent_loss, cosines
from largebatch.step.balance import Pairs
from largebatch.step.objective import (
    EmbeddedBatch,
    EmbeddingObjective,
    ObjectiveValue,
    Side,
    SourceNote,
)

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

SIMILARITIES = {"cosent": cosines, "angle": angle_similarities}


def build(config: "TrainConfig") -> "SimilarityOrder":
    """Return the objective of a run."""
    return SimilarityOrder(config.objective.sts.kind, config.objective.sts.scale)


class SimilarityOrder(EmbeddingObjective):
    """CoSENT, or AnglE, over all pairs of the global batch.

        loss = log(1 + sum over i, j with y_i < y_j of exp(scale (s_i - s_j)))

    It is no mean over rows. Every rank computes the whole of it from the N similarities, and their
    gradients are added up over ranks on the way back: so each rank's own share is the loss itself,
    and strategies, which average over ranks, are right.

    Args:
        kind: What s is: the cosine (cosent) or AnglE's similarity (angle).
        scale: Inverse temperature.
    """

    fields = ("query", "document", "label")

    def __init__(self, kind: str = "cosent", scale: float = 20.0) -> None:
        super().__init__()
        self.similarities = SIMILARITIES[kind]
        self.scale = scale

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:
        """Return the labels, bit by bit.

        Raises:
            UserError: The batch has none.
        """
        if pairs.labels is None:
            raise UserError("the objective needs labels: pass a batch with `labels`")
        return {"labels": pairs.labels.view(np.int64)}

    def gathered_sides(self, options: LossOptions) -> Sequence[Side]:  # noqa: ARG002
        """Return nothing: ranks need each other's similarities only."""
        return ()

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, and how many of all pairs of pairs have an order."""
        dtype = torch.promote_types(batch.queries_bd.dtype, torch.float32)
        own_b = self.similarities(batch.queries_bd.to(dtype), batch.documents_bd.to(dtype))
        counts = [one.num_pairs for one in batch.facts]
        similarities_N = batch.collectives.gather_rows(own_b[:, None], counts).rows.squeeze(1)
        labels_N = np.concatenate([one.known["labels"] for one in batch.facts]).view(np.float64)
        order = LabelOrder.of(labels_N, similarities_N.device)
        loss = cosent_loss(similarities_N, order, self.scale)
        possible = batch.num_pairs * (batch.num_pairs - 1) / 2
        share = loss.detach().new_full((), order.num_compared / max(possible, 1))
        return ObjectiveValue(loss, loss.detach(), {"ordered_share": share})

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Say that a batch teaches nothing."""
        if metrics["ordered_share"] > 0:
            return None
        return (
            f"all labels of its batch (source {', '.join(one.name for one in sources)}) are the "
            "same, so that it teaches nothing: see that fields.label names the right field, or "
            "raise global_batch"
        )
