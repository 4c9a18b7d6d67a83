"""The objective of a global batch: gather, loss, and the mean over the rows of all ranks.

Each rank computes its own rows of the loss against the columns of all ranks. A rank's value is its
rows' sum divided by (rows of all ranks / world size), the plain mean where ranks have equally many
rows. Strategies average gradients over ranks; so that average, and nothing else, is the gradient of
the mean over the global batch, for the weights and for the temperature at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.parallel.collectives import Collectives


class ObjectiveValue(NamedTuple):
    """The loss of a global batch, as this rank sees it."""

    rank_loss: Tensor
    """Scalar to back-propagate: its gradients, averaged over ranks, are the global batch's."""
    loss: Tensor
    """Scalar without a graph, the same on all ranks: the mean over the global batch."""
    accuracy: Tensor
    """Scalar, the share of the global batch's queries whose own document scores highest."""


class ContrastiveObjective:
    """Contrasts each query with the documents and negatives of all ranks.

    Args:
        loss: The loss.
        collectives: How ranks reach each other.
    """

    def __init__(self, loss: ContrastiveLoss, collectives: Collectives) -> None:
        self.loss = loss
        self.collectives = collectives

    def __call__(
        self,
        queries_bd: Tensor,
        documents_bd: Tensor,
        negatives_nd: Tensor,
        *,
        symmetric: bool | None = None,
    ) -> ObjectiveValue:
        """Return the loss. All ranks must call it; b and n may differ between them, and be 0.

        Args:
            queries_bd: This rank's queries.
            documents_bd: Their documents.
            negatives_nd: Further documents.
            symmetric: The same on all ranks; None: as the loss says.

        Raises:
            UserError: No rank has a query.
        """
        world = self.collectives.world
        b, n = len(queries_bd), len(negatives_nd)
        numbers = torch.tensor([b, n], device=queries_bd.device)
        rows_per_rank = self.collectives.gather_counts(numbers).tolist()
        columns = self.collectives.gather_rows(
            torch.cat([documents_bd, negatives_nd]), [b + n for b, n in rows_per_rank]
        )
        num_rows = sum(b for b, _ in rows_per_rank)
        if num_rows == 0:
            raise UserError("the global batch has no pairs; all of its records were skipped")
        first_column = sum(columns.counts[: world.rank])
        result = self.loss.sum_over_rows(
            queries_bd,
            columns.rows,
            torch.arange(first_column, first_column + b, device=queries_bd.device),
            symmetric=symmetric,
            combine_columns=self.collectives.combine_logsumexp,
        )
        totals = self.collectives.sum(
            torch.stack([result.loss_sum.detach(), result.correct.sum().to(result.loss_sum.dtype)])
        )
        loss, accuracy = totals / num_rows
        return ObjectiveValue(result.loss_sum / (num_rows / world.size), loss, accuracy)
