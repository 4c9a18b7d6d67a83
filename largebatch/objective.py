"""The objective of a global batch: gather, loss, and the mean over the rows of all ranks.

Each rank computes its own rows of the loss against the columns of all ranks. A rank's value is its
rows' sum divided by (rows of all ranks / world size), the plain mean where ranks have equally many
rows. Strategies average gradients over ranks; so that average, and nothing else, is the gradient of
the mean over the global batch, for the weights and for the temperature at once.

What ranks tell each other, once per step however many tiles there are:

1. how many rows each has, with the hashes of their texts: an all-gather of integers (a second one
   where a rank has more of them than any had before);
2. the embeddings of documents and negatives: an all-gather, and a reduce-scatter of their gradient;
3. the loss and the number of correct rows: an all-reduce of two numbers. With a symmetric loss the
   columns' statistics go with it, after another all-reduce that finds their maxima.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from largebatch.batch import Texts
from largebatch.data.hashes import id_hashes, text_hashes
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.parallel.collectives import Collectives
from largebatch.phases import phase


class ObjectiveValue(NamedTuple):
    """The loss of a global batch, as this rank sees it."""

    rank_loss: Tensor
    """Scalar to back-propagate: its gradients, averaged over ranks, are the global batch's."""
    loss: Tensor
    """Scalar without a graph, the same on all ranks: the mean over the global batch."""
    accuracy: Tensor
    """Scalar, the share of the global batch's queries whose own document scores highest."""


def hash_pairs(
    queries: Texts, documents: Texts, negatives: Texts, ids: Sequence[str] | None = None
) -> PairHashes:
    """Return the hashes of one rank's texts, and of its records' ids if they are known."""
    return PairHashes(
        torch.from_numpy(text_hashes(queries)),
        torch.from_numpy(text_hashes(documents)),
        torch.from_numpy(text_hashes(negatives)),
        None if ids is None else torch.from_numpy(id_hashes(ids)),
    )


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
        hashes: PairHashes | None = None,
    ) -> ObjectiveValue:
        """Return the loss. All ranks must call it; b and n may differ between them, and be 0.

        Args:
            queries_bd: This rank's queries.
            documents_bd: Their documents.
            negatives_nd: Further documents.
            symmetric: The same on all ranks; None: as the loss says.
            hashes: Of the texts behind the embeddings, for leaving out false negatives if the loss
                says so. All ranks give them, with ids or all without, or none does.

        Raises:
            UserError: No rank has a query.
        """
        world, device = self.collectives.world, queries_bd.device
        if not self.loss.mask_duplicates:
            hashes = None
        # 1. Numbers of rows, and hashes.
        with phase("gather"):
            rows_per_rank, hashes_per_rank = self._tell_rows(
                len(queries_bd), len(negatives_nd), hashes, device
            )
        num_rows = sum(b for b, _ in rows_per_rank)
        if num_rows == 0:
            raise UserError("the global batch has no pairs; all of its records were skipped")
        false_negatives = None
        if hashes_per_rank:
            false_negatives = FalseNegatives(hashes_per_rank, rank=world.rank, device=device)
        # 2. Columns.
        columns_nd = torch.cat([documents_bd, negatives_nd]) if len(negatives_nd) else documents_bd
        with phase("gather"):
            columns = self.collectives.gather_rows(columns_nd, [b + n for b, n in rows_per_rank])
        # 3. Loss.
        first_column = sum(columns.counts[: world.rank])
        with phase("loss"):
            result = self.loss.sum_over_rows(
                queries_bd,
                columns.rows,
                torch.arange(first_column, first_column + len(queries_bd), device=device),
                symmetric=symmetric,
                false_negatives=false_negatives,
                combine=self.collectives.combine,
            )
            loss, accuracy = result.totals / num_rows
        return ObjectiveValue(result.loss_sum / (num_rows / world.size), loss, accuracy)

    def _tell_rows(
        self, b: int, n: int, hashes: PairHashes | None, device: torch.device
    ) -> tuple[list[tuple[int, int]], list[PairHashes]]:
        """Return the numbers of rows and negatives of each rank, and their hashes if there are."""
        values = torch.tensor([b, n])
        if hashes is not None:
            sides = (hashes.queries, hashes.documents, hashes.negatives)
            assert [len(side) for side in sides] == [b, b, n]
            values = torch.cat([values, *sides, *(() if hashes.ids is None else (hashes.ids,))])
        rows_per_rank, hashes_per_rank = [], []
        for told in self.collectives.gather_ragged(values, device=device):
            b, n = told[:2].tolist()
            rows_per_rank.append((b, n))
            if hashes is not None:
                queries, documents, negatives, ids = told[2:].tensor_split([b, 2 * b, 2 * b + n])
                assert len(ids) == (0 if hashes.ids is None else b), "ranks know different things"
                known = None if hashes.ids is None else ids
                hashes_per_rank.append(PairHashes(queries, documents, negatives, known))
        return rows_per_rank, hashes_per_rank
