"""The objective of a global batch: gather, loss, and the mean over the rows of all ranks.

Each rank computes its own rows of the loss against the columns of all ranks. A rank's value is its
rows' sum divided by (rows of all ranks / world size), the plain mean where ranks have equally many
rows. Strategies average gradients over ranks; so that average, and nothing else, is the gradient of
the mean over the global batch, for the weights and for the temperature at once.

What ranks tell each other, once per step however many tiles there are:

1. how many rows each has, with the hashes of their texts and of its generator: an all-gather of
   integers (a second one where a rank has more of them than any had before), from host to host;
2. the embeddings of documents and negatives: an all-gather, and a reduce-scatter of their gradient;
3. the loss, and how many rows are correct, how many negatives are left out as false ones and how
   many rows have none left: an all-reduce of four numbers. With a symmetric loss the
   columns' statistics go with it, after another all-reduce that finds their maxima.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Texts
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.parallel.collectives import Collectives, Gathering
from largebatch.phases import phase
from largebatch.step.hashes import Hashes, text_hashes


class ObjectiveValue(NamedTuple):
    """The loss of a global batch, as this rank sees it."""

    rank_loss: Tensor
    """Scalar to back-propagate: its gradients, averaged over ranks, are the global batch's."""
    loss: Tensor
    """Scalar without a graph, the same on all ranks: the mean over the global batch."""
    accuracy: Tensor
    """Scalar, the share of the global batch's queries whose own document scores highest."""
    masked_share: Tensor
    """Scalar, the share of the global batch's negatives that is left out as false ones."""
    without_negatives: Tensor
    """Scalar, the share of the global batch's queries that have no negative."""


class RowsOfRanks(NamedTuple):
    """What ranks have told each other of a global batch before it is embedded."""

    counts: list[tuple[int, int]]
    """Queries, and negatives, of each rank."""
    hashes: list[PairHashes]
    """Of each rank; empty if none has told them."""
    most_chunks: int
    """The most that any rank has."""
    random_states: list[int]
    """A hash of each rank's generator."""

    @property
    def columns(self) -> list[int]:
        """Documents and negatives of each rank."""
        return [b + n for b, n in self.counts]


def hash_pairs(
    queries: Texts, documents: Texts, negatives: Texts, ids: Hashes | None = None
) -> PairHashes:
    """Return the hashes of one rank's texts, beside those of its records' ids if they are known."""
    return PairHashes(text_hashes(queries), text_hashes(documents), text_hashes(negatives), ids)


class ContrastiveObjective:
    """Contrasts each query with the documents and negatives of all ranks.

    Args:
        loss: The loss.
        collectives: How ranks reach each other.
    """

    def __init__(self, loss: ContrastiveLoss, collectives: Collectives) -> None:
        self.loss = loss
        self.collectives = collectives

    def tell(
        self,
        num_pairs: int,
        num_negatives: int,
        hashes: PairHashes | None,
        *,
        num_chunks: int = 0,
        random_state: int = 0,
    ) -> RowsOfRanks:
        """Tell all ranks what this one has, and return what they have; all ranks must call it.

        Args:
            num_pairs: Queries of this rank; may be 0.
            num_negatives: Further documents; may be 0.
            hashes: Of their texts, for leaving out false negatives. All ranks give them, with ids
                or all without, or none does.
            num_chunks: Chunks of this rank.
            random_state: A hash of this rank's generator.

        Raises:
            UserError: No rank has a query.
        """
        values = [np.array([num_pairs, num_negatives, num_chunks, random_state])]
        if hashes is not None:
            sides = [hashes.queries, hashes.documents, hashes.negatives]
            assert [len(side) for side in sides] == [num_pairs, num_pairs, num_negatives]
            values += sides if hashes.ids is None else [*sides, hashes.ids]
        counts, hashes_per_rank, most_chunks, random_states = [], [], 0, []
        for told in self.collectives.gather_ragged(np.concatenate(values)):
            b, n, chunks, state = told[:4].tolist()
            counts.append((b, n))
            random_states.append(state)
            most_chunks = max(most_chunks, chunks)
            if hashes is not None:
                queries, documents, negatives, ids = np.split(told[4:], [b, 2 * b, 2 * b + n])
                assert len(ids) == (0 if hashes.ids is None else b), "ranks know different things"
                known = None if hashes.ids is None else ids
                hashes_per_rank.append(PairHashes(queries, documents, negatives, known))
        if sum(b for b, _ in counts) == 0:
            raise UserError("the global batch has no pairs; all of its records were skipped")
        return RowsOfRanks(counts, hashes_per_rank, most_chunks, random_states)

    def __call__(
        self,
        queries_bd: Tensor,
        documents_bd: Tensor,
        negatives_nd: Tensor,
        *,
        rows: RowsOfRanks,
        columns: Gathering | None = None,
        symmetric: bool | None = None,
    ) -> ObjectiveValue:
        """Return the loss. All ranks must call it; b and n may differ between them, and be 0.

        Args:
            queries_bd: This rank's queries.
            documents_bd: Their documents.
            negatives_nd: Further documents.
            rows: What `tell` returned for these rows. Hashes leave out false negatives.
            columns: The gathering of documents and negatives, if it has begun.
            symmetric: The same on all ranks; None: as the loss says.
        """
        world, device = self.collectives.world, queries_bd.device
        # 2. Columns.
        with phase("gather"):
            own_nd = torch.cat([documents_bd, negatives_nd]) if len(negatives_nd) else documents_bd
            gathered = self.collectives.gather_rows(own_nd, rows.columns, started=columns)
        # 3. Loss.
        with phase("loss"):
            false_negatives = None
            if rows.hashes:
                false_negatives = FalseNegatives(rows.hashes, rank=world.rank, device=device)
            first = sum(gathered.counts[: world.rank])
            result = self.loss.sum_over_rows(
                queries_bd,
                gathered.rows,
                torch.arange(first, first + len(queries_bd), device=device),
                symmetric=symmetric,
                false_negatives=false_negatives,
                combine=self.collectives.combine,
            )
            num_rows = sum(b for b, _ in rows.counts)
            num_negatives = num_rows * (sum(gathered.counts) - 1)
            loss, accuracy, _, without_negatives = result.totals / num_rows
            masked_share = result.totals[2] / max(num_negatives, 1)
        return ObjectiveValue(
            result.loss_sum / (num_rows / world.size),
            loss,
            accuracy,
            masked_share,
            without_negatives,
        )
