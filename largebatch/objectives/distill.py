"""Distillation: the student is to score a query's own candidates as a teacher does.

The candidates of a query are its document and its record's negatives, whose scores by a teacher
(a cross-encoder, say) are in the records. Beside it the contrastive loss may run on the same batch.

Shapes: b pairs of this rank, n negatives of this rank, K candidates of the query that has most,
d embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.distill import (
    Candidates,
    kl_divergence,
    margin_errors,
    student_scores,
)
from largebatch.model.encoder import Encoder
from largebatch.objectives import contrastive
from largebatch.step.balance import Pairs
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


def build(config: "TrainConfig") -> "Distillation":
    """Return the objective of a run.

    Raises:
        UserError: Options of the contrastive loss don't fit together.
    """
    options = config.objective.distill
    return Distillation(
        contrastive.build(config),
        kind=options.kind,
        teacher_temperature=options.teacher_temperature,
        scale_by_t2=options.scale_by_t2,
        contrastive_weight=options.contrastive_weight,
    )


class Distillation(EmbeddingObjective):
    """The mean over rows of a distance to the teacher, plus a weighted contrastive loss.

        kl:          KL(softmax(teacher / T_t) || softmax(student / T)) of a row
        margin_mse:  mean over its negatives of (student's margin - teacher's margin)^2

    A row without negatives adds 0 to it. Both parts are means over the rows of the global batch, so
    that their ratio is what the weight says, on any number of ranks.

    Args:
        contrastive_loss: What runs on the same batch; its temperature is the student's, T.
        kind: kl or margin_mse.
        teacher_temperature: T_t, for kl.
        scale_by_t2: Whether kl is multiplied by T^2, which counts as a constant then.
        contrastive_weight: Weight of the contrastive loss; 0: it is not computed.
    """

    fields = ("query", "document", "negatives", "scores")

    def __init__(
        self,
        contrastive_loss: contrastive.ContrastiveLoss,
        *,
        kind: str = "kl",
        teacher_temperature: float = 1.0,
        scale_by_t2: bool = False,
        contrastive_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.contrastive = contrastive_loss
        self.kind = kind
        self.teacher_temperature = teacher_temperature
        self.scale_by_t2 = scale_by_t2
        self.contrastive_weight = contrastive_weight
        self.has_temperature = kind == "kl" or contrastive_weight > 0
        if contrastive_weight > 0:
            self.used_options = contrastive_loss.used_options
            self.source_options = contrastive_loss.source_options

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
        """Return what the contrastive loss needs: a row's own candidates are on its rank."""
        return self.contrastive.gathered_sides(options) if self.contrastive_weight else ()

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, its parts, and how often student and teacher prefer the same candidate.

        Raises:
            UserError: The batch has no scores.
        """
        if batch.scores is None or batch.negative_counts is None:
            raise UserError(
                "distillation needs a teacher's scores: pass a batch with `scores` and "
                "`negative_counts`"
            )
        device = batch.queries_bd.device
        candidates = Candidates.of(batch.negative_counts, device)
        student_bK = student_scores(
            batch.queries_bd, batch.documents_bd, batch.negatives_nd, candidates
        )
        teacher_bK = candidates.in_rows(
            *(to_device(one, device).to(student_bK.dtype) for one in batch.scores)
        )
        agreed = (student_bK.detach().argmax(1) == teacher_bK.argmax(1)).sum()
        value = batch.mean_over_rows(
            self.of_rows(student_bK, teacher_bK, batch.step).sum(), {"agreement": agreed}
        )
        if not self.contrastive_weight:
            return value
        other, weight = self.contrastive.compute(batch), self.contrastive_weight
        parts = {"distillation_loss": value.loss, "contrastive_loss": other.loss}
        return ObjectiveValue(
            value.own_share + weight * other.own_share,
            value.loss + weight * other.loss,
            {**other.metrics, **value.metrics, **parts},
        )

    def of_rows(self, student_bK: Tensor, teacher_bK: Tensor, step: int = 0) -> Tensor:
        """Return the distance to the teacher of each row, `[b]`.

        Args:
            student_bK: Scores of the candidates of each row, -inf where there is none.
            teacher_bK: The teacher's.
            step: What a scheduled temperature depends on.
        """
        if self.kind == "margin_mse":
            return margin_errors(student_bK, teacher_bK)
        scale = self.contrastive.temperature(step).to(student_bK)
        losses_b = kl_divergence(student_bK, teacher_bK, scale, self.teacher_temperature)
        return losses_b / scale.detach().square() if self.scale_by_t2 else losses_b

    def after_step(self) -> None:
        """Bring a learned temperature back into its bounds."""
        self.contrastive.after_step()

    def warning(self, metrics: Mapping[str, float], sources: Sequence[SourceNote]) -> str | None:
        """Say what the contrastive loss has to say."""
        return self.contrastive.warning(metrics, sources) if self.contrastive_weight else None

    def why_not_finite(self, config: "TrainConfig") -> str | None:
        """Say what the contrastive loss has to say."""
        return self.contrastive.why_not_finite(config)
