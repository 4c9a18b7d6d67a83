"""An objective beside which a contrastive loss runs on the same batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from largebatch.batch import Int64Array
from largebatch.config import LossOptions
from largebatch.model.encoder import Encoder
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


class BesideContrast(EmbeddingObjective):
    """Adds a contrastive loss by a weight: `compute` of a subclass ends with `with_contrast`.

    Both are means over the rows of the global batch, so their ratio is what the weight says, on any
    number of ranks.

    Args:
        contrastive: What runs on the same batch.
        contrastive_weight: Its weight; 0: it is not computed.
    """

    def __init__(self, contrastive: EmbeddingObjective, contrastive_weight: float) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.contrastive_weight = contrastive_weight
        if contrastive_weight > 0:
            self.has_temperature = contrastive.has_temperature
            self.used_options = contrastive.used_options
            self.source_options = contrastive.source_options

    def attach(self, encoder: Encoder, *, weights: str | None) -> None:
        """Let the contrastive loss look at the encoder."""
        self.contrastive.attach(encoder, weights=weights)

    def fingerprints(self) -> Mapping[str, str]:
        """Return what the contrastive loss has read."""
        return self.contrastive.fingerprints()

    def knowledge(self, pairs: Pairs) -> Mapping[str, Int64Array]:
        """Return what the contrastive loss needs."""
        return self.contrastive.knowledge(pairs) if self.contrastive_weight else {}

    def gathered_sides(self, options: LossOptions) -> Sequence[Side]:
        """Return what the contrastive loss needs."""
        if not self.contrastive_weight:
            return ()
        return tuple(self.contrastive.gathered_sides(options))

    def with_contrast(
        self, batch: EmbeddedBatch, value: ObjectiveValue, name: str
    ) -> ObjectiveValue:
        """Return the sum of a value and the weighted contrastive loss, and both as metrics.

        Args:
            batch: What the value was computed of.
            value: The objective's own.
            name: What to call it among the metrics.
        """
        if not self.contrastive_weight:
            return value
        other, weight = self.contrastive.compute(batch), self.contrastive_weight
        parts = {name: value.loss, "contrastive_loss": other.loss}
        return ObjectiveValue(
            value.own_share + weight * other.own_share,
            value.loss + weight * other.loss,
            {**other.metrics, **value.metrics, **parts},
        )

    def after_step(self) -> None:
        """Bring a learned temperature back into its bounds."""
        self.contrastive.after_step()

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Say what the contrastive loss has to say."""
        return self.contrastive.warning(metrics, sources) if self.contrastive_weight else None

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Say what the contrastive loss has to say."""
        return self.contrastive.why_not_finite(config)
