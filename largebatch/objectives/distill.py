"""Distillation: the student is to score a query's own candidates as a teacher does.

The candidates of a query are its document and its record's negatives, whose scores by a teacher
(a cross-encoder, say) are in the records. Beside it the contrastive loss may run on the same batch.

Shapes: b pairs of this rank, n negatives of this rank, K candidates of the query that has most,
d embedding width.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from largebatch.errors import UserError
from largebatch.losses.distill import (
    Candidates,
    kl_divergence,
    margin_errors,
    student_scores,
)
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.objectives.contrastive import build as build_contrastive
from largebatch.step.beside import BesideContrast
from largebatch.step.objective import (
    EmbeddedBatch,
    ObjectiveValue,
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
        build_contrastive(config),
        kind=options.kind,
        teacher_temperature=options.teacher_temperature,
        scale_by_t2=options.scale_by_t2,
        contrastive_weight=options.contrastive_weight,
    )


class Distillation(BesideContrast):
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
    contrastive: ContrastiveLoss

    def __init__(
        self,
        contrastive_loss: ContrastiveLoss,
        *,
        kind: str = "kl",
        teacher_temperature: float = 1.0,
        scale_by_t2: bool = False,
        contrastive_weight: float = 0.0,
    ) -> None:
        super().__init__(contrastive_loss, contrastive_weight)
        self.kind = kind
        self.teacher_temperature = teacher_temperature
        self.scale_by_t2 = scale_by_t2
        self.has_temperature |= kind == "kl"

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
        return self.with_contrast(batch, value, "distillation_loss")

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
