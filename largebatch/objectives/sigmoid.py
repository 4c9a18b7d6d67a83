"""The sigmoid loss of SigLIP: does a document answer a query? is asked of each two of them.

Each rank computes its own rows of the loss against the columns of all ranks: the documents, and
the records' negatives. Scale and bias are learned, and take the place of a temperature.

Shapes: b queries of this rank, m columns, d embedding width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from largebatch.batch import Int64Array
from largebatch.config import LossOptions
from largebatch.losses.sigmoid import sigmoid_loss
from largebatch.step.balance import Pairs
from largebatch.step.false_negatives import TextMasks, hashes_of
from largebatch.step.objective import EmbeddedBatch, EmbeddingObjective, ObjectiveValue, Side

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

HIGH_SCALE = 1e4
"""Above this, products of unit vectors times the scale are beyond what training is for."""


def build(config: "TrainConfig") -> "SigmoidLoss":
    """Return the objective of a run."""
    options = config.objective.sigmoid
    return SigmoidLoss(
        options.scale, options.bias, mask_duplicates=config.objective.mask_duplicates
    )


class SigmoidLoss(EmbeddingObjective):
    """SigLIP (arXiv 2303.15343) with in-batch negatives and the records' own.

        loss = -1/B sum_i sum_j log sigmoid(z_ij (t cos_ij + b)),  z_ij = 1 if i = j else -1

    The sum runs over the columns of all ranks, the mean over its B rows.

    Args:
        scale: Where t starts; it is learned as its logarithm.
        bias: Where b starts.
        mask_duplicates: Whether false negatives, known by their texts, add nothing: see masks.py.
    """

    used_options = ("mask_duplicates",)

    def __init__(
        self, scale: float = 10.0, bias: float = -10.0, *, mask_duplicates: bool = True
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))
        self.mask_duplicates = mask_duplicates

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:
        """Return hashes of the texts, and of the records' ids if they are known."""
        return hashes_of(pairs) if self.mask_duplicates else {}

    def gathered_sides(self, options: LossOptions) -> Sequence[Side]:  # noqa: ARG002
        """Return what queries are compared with on all ranks."""
        return ("document", "negative")

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, and how well queries tell their documents from all columns."""
        assert batch.gathered_md is not None
        b, device = len(batch.queries_bd), batch.queries_bd.device
        first, masks = batch.first_gathered, None
        if self.mask_duplicates:
            masks = TextMasks(batch).of_documents(with_negatives=True)
        sums = sigmoid_loss(
            batch.queries_bd,
            batch.gathered_md,
            torch.arange(first, first + b, device=device),
            self.log_scale.exp(),
            self.bias,
            false_negatives=masks,
        )
        value = batch.mean_over_rows(
            sums.loss,
            {
                "accuracy": sums.num_correct,
                "positive_loss": sums.positive_loss,
                "masked_share": sums.num_masked,
            },
        )
        num_others = sum(one.count(("document", "negative")) for one in batch.facts) - 1
        metrics = {
            **value.metrics,
            "masked_share": value.metrics["masked_share"] / max(num_others, 1),
            "scale": self.log_scale.detach().exp(),
            "bias": self.bias.detach().clone(),
        }
        return value._replace(metrics=metrics)

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Say what makes logits or gradient overflow where embeddings are finite."""
        scale = math.exp(min(float(self.log_scale.detach()), 700))
        if not scale < HIGH_SCALE:
            return f"the learned scale has come up to {scale:g}; lower optim.lr={config.optim.lr:g}"
        if config.pooling.normalize is False:
            return "the embeddings have no unit length; set pooling.normalize=true"
        return None
