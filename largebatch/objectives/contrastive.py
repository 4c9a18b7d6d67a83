"""Contrastive learning: each query is told from the documents of the whole global batch (InfoNCE).

Each rank computes its own rows of the loss against the columns of all ranks: the documents, and
the records' negatives where every query is contrasted with them.

Shapes: b queries of this rank, n negatives of this rank, m columns, d embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.infonce import Combine, InfoNCE, OwnNegatives, info_nce
from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.losses.temperature import Temperature
from largebatch.step.balance import Pairs
from largebatch.step.hashes import text_hashes
from largebatch.step.objective import (
    EmbeddedBatch,
    EmbeddingObjective,
    ObjectiveValue,
    Side,
    SourceNote,
)
from largebatch.transfer import to_device

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

SMALL_TEMPERATURE = 1e-4
"""Below this, products of unit vectors over the temperature are beyond what training is for."""
MUCH_MASKED = 0.1
"""Share of a batch's negatives that a person is told of when it is left out."""


def build(config: "TrainConfig") -> "ContrastiveLoss":
    """Return the objective of a run."""
    temperature = Temperature(
        config.temperature.value,
        learned=config.temperature.learned,
        min=config.temperature.min,
        max=config.temperature.max,
    )
    return ContrastiveLoss(
        temperature,
        symmetric=config.objective.symmetric,
        mask_duplicates=config.objective.mask_duplicates,
        own_negatives=config.objective.negatives == "own",
    )


class ContrastiveLoss(EmbeddingObjective):
    """InfoNCE with in-batch negatives and a temperature.

    Args:
        temperature: Default: fixed at 0.05.
        symmetric: Whether documents are matched to queries too, both directions weighing half.
        mask_duplicates: Whether false negatives, known by their texts, are left out: see masks.py.
        own_negatives: Whether the negatives of a record are contrasted with its own query only, not
            with those of the whole global batch.
    """

    source_options = ("symmetric", "negatives")

    def __init__(
        self,
        temperature: Temperature | None = None,
        *,
        symmetric: bool = False,
        mask_duplicates: bool = True,
        own_negatives: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature if temperature is not None else Temperature()
        self.symmetric = symmetric
        self.mask_duplicates = mask_duplicates
        self.own_negatives = own_negatives

    def forward(self, queries_bd: Tensor, documents_md: Tensor) -> Tensor:
        """Return the mean loss of b queries whose documents are the first b of m documents.

        Nothing is known of texts here, so every other document is a negative.
        """
        if len(documents_md) < len(queries_bd):
            raise UserError(
                f"{len(queries_bd)} queries need a document each, got {len(documents_md)}"
            )
        positives_b = torch.arange(len(queries_bd), device=queries_bd.device)
        result = self.sum_over_rows(queries_bd, documents_md, positives_b)
        return result.loss_sum / len(queries_bd)

    def sum_over_rows(
        self,
        queries_bd: Tensor,
        documents_md: Tensor,
        positives_b: Tensor,
        *,
        symmetric: bool | None = None,
        false_negatives: FalseNegatives | None = None,
        own_negatives: OwnNegatives | None = None,
        combine: Combine | None = None,
    ) -> InfoNCE:
        """Return the loss summed over this rank's rows: `info_nce` with this object's settings.

        `symmetric` is for this call only; None: as the object says.
        """
        return info_nce(
            queries_bd,
            documents_md,
            positives_b,
            self.temperature(),
            symmetric=self.symmetric if symmetric is None else symmetric,
            false_negatives=false_negatives,
            own_negatives=own_negatives,
            combine=combine,
        )

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:
        """Return hashes of the texts, and of the records' ids if they are known."""
        if not self.mask_duplicates:
            return {}
        hashes = {
            "queries": text_hashes(pairs.queries),
            "documents": text_hashes(pairs.documents),
            "negatives": text_hashes(pairs.negatives),
        }
        return hashes if pairs.id_hashes is None else hashes | {"ids": pairs.id_hashes}

    def gathered_sides(self, options: LossOptions) -> Sequence[Side]:
        """Return what queries are contrasted with on all ranks."""
        return ("document",) if self._has_own_negatives(options) else ("document", "negative")

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, and how well queries find their documents among all columns."""
        assert batch.gathered_md is not None
        device, b = batch.queries_bd.device, len(batch.queries_bd)
        rank = batch.collectives.world.rank
        has_own = self._has_own_negatives(batch.options)
        false_negatives = None
        if self.mask_duplicates:
            hashes = [
                PairHashes(
                    one.known["queries"],
                    one.known["documents"],
                    one.known["negatives"],
                    one.known.get("ids"),
                )
                for one in batch.facts
            ]
            false_negatives = FalseNegatives(
                hashes, rank=rank, device=device, negatives_are_columns=not has_own
            )
        own_negatives = None
        if has_own:
            if batch.negative_counts is None and any(one.num_negatives for one in batch.facts):
                raise UserError(
                    "negatives=own needs to know whose each negative is: pass negative_counts"
                )
            own_negatives = self._own_negatives(batch, false_negatives)
        first = batch.first_gathered
        result = self.sum_over_rows(
            batch.queries_bd,
            batch.gathered_md,
            torch.arange(first, first + b, device=device),
            symmetric=batch.options.symmetric,
            false_negatives=false_negatives,
            own_negatives=own_negatives,
            combine=batch.collectives.combine,
        )
        num_negatives = sum(one.num_negatives for one in batch.facts)
        if has_own:
            num_possible = batch.num_pairs * (batch.num_pairs - 1) + num_negatives
        else:
            num_possible = batch.num_pairs * (batch.num_pairs + num_negatives - 1)
        loss, accuracy, _, without_negatives = result.totals / batch.num_pairs
        metrics = {
            "accuracy": accuracy,
            "masked_share": result.totals[2] / max(num_possible, 1),
            "without_negatives": without_negatives,
            "temperature": self.temperature.log_scale.detach().neg().exp(),
        }
        return ObjectiveValue(batch.own_share(result.loss_sum), loss, metrics)

    def after_step(self) -> None:
        """Bring a learned temperature back into its bounds."""
        self.temperature.clamp_()

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Say that a batch has lost many negatives, and what can be done."""
        share, none_left = metrics["masked_share"], metrics["without_negatives"]
        # A single pair has no negatives either, and nothing was left out.
        if share < MUCH_MASKED and not (share > 0 and none_left > 0):
            return None
        by_id = [source.name for source in sources if source.mask_same_id]
        cures = [
            f"set data.sources.{name}.mask_same_id=false if its ids repeat without a meaning, "
            for name in by_id
        ]
        return (
            f"{share:.1%} of the negatives in its batch "
            f"(source {', '.join(source.name for source in sources)}) are left out as false ones, "
            f"and {none_left:.1%} of its queries have none left: many of its "
            f"records have the same query, document{' or id' if by_id else ''}; {''.join(cures)}"
            "leave out what repeats (`largebatch data stats` counts it, `largebatch dedup` finds "
            "it), or give such a source less weight; train/masked_share is logged for every step"
        )

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Say what makes logits or gradient overflow where embeddings are finite."""
        temperature = self.temperature.value
        if temperature < SMALL_TEMPERATURE:
            given = config.temperature
            if given.learned:
                return (
                    f"the learned temperature has come down to {temperature:g}; raise "
                    f"temperature.min={given.min:g}, for example to 0.01"
                )
            return f"temperature.value={given.value:g} is too low; raise it, for example to 0.05"
        if config.pooling.normalize is False:
            return (
                "the embeddings have no unit length, and their products overflow; set "
                "pooling.normalize=true, or raise temperature.value"
            )
        return None

    def _has_own_negatives(self, options: LossOptions) -> bool:
        return self.own_negatives if options.negatives is None else options.negatives == "own"

    @staticmethod
    def _own_negatives(
        batch: EmbeddedBatch, false_negatives: FalseNegatives | None
    ) -> OwnNegatives | None:
        """Return this rank's negatives with their owners; None: no rank has any."""
        counts = batch.negative_counts
        if counts is None or not any(one.num_negatives for one in batch.facts):
            return None
        device = batch.queries_bd.device
        owners_n = np.repeat(np.arange(len(counts)), counts)
        places_n = np.arange(len(owners_n)) - np.repeat(np.cumsum(counts) - counts, counts)
        masked_n = None if false_negatives is None else false_negatives.of_own(owners_n)
        return OwnNegatives(
            batch.negatives_nd,
            to_device(owners_n, device),
            to_device(places_n, device),
            int(counts.max(initial=0)),
            None if masked_n is None else to_device(masked_n, device),
        )
