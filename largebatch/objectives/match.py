"""A teacher's embeddings: those of the trained model are to be the same (EmbeddingGemma).

Embedding matching (arXiv 2509.20354) says that the student's embeddings of queries and documents
move to the teacher's; what is published does not give the distance. Here it is the squared one of
unit vectors, which is twice 1 - cosine, the mean of both sides:

    L_i = 1/2 (|q_i - t(q_i)|^2 + |d_i - t(d_i)|^2) = 2 - cos(q_i, t(q_i)) - cos(d_i, t(d_i))

Shapes: b pairs of this rank, d embedding width.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.objectives.contrastive import build as build_contrastive
from largebatch.step.beside import BesideContrast
from largebatch.step.guide import Guide
from largebatch.step.objective import EmbeddedBatch, ObjectiveValue

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

TEACHER = "objective.match.teacher"


def build(config: "TrainConfig") -> "EmbeddingMatch":
    """Return the objective of a run.

    Raises:
        UserError: There is no such teacher, or options of the contrastive loss don't fit together.
    """
    options = config.objective.match
    assert options.teacher is not None, "the config's checks ask for one"
    teacher = Guide.from_pretrained(
        options.teacher, tokens_per_chunk=options.tokens_per_chunk, option=TEACHER
    )
    return EmbeddingMatch(build_contrastive(config), teacher, options.contrastive_weight)


class EmbeddingMatch(BesideContrast):
    """The mean squared distance of embeddings from a teacher's, plus a weighted contrastive loss.

    Args:
        contrastive_loss: What runs on the same batch.
        teacher: A frozen encoder, whose embeddings have the student's width.
        contrastive_weight: Weight of the contrastive loss; 0: it is not computed.
    """

    def __init__(
        self,
        contrastive_loss: ContrastiveLoss,
        teacher: Guide,
        contrastive_weight: float = 0.0,
    ) -> None:
        super().__init__(contrastive_loss, contrastive_weight)
        self.teacher = teacher

    def attach(self, encoder: Encoder, *, weights: str | None) -> None:
        """Tell the teacher whose tokens it gets; compare the widths."""
        super().attach(encoder, weights=weights)
        own, wanted = encoder.embedding_width, self.teacher.encoder.embedding_width
        if own != wanted:
            raise UserError(
                f"{TEACHER}={self.teacher.name} has embeddings of {wanted} numbers, and the model "
                f"of {own}; choose a teacher of the model's width, or a layer behind the model's "
                f"pooling, pooling.dense=[{wanted}]"
            )
        self.teacher.meet(encoder)

    def fingerprints(self) -> Mapping[str, str]:
        """Return hashes of the weights of teacher and guide."""
        return {**super().fingerprints(), TEACHER: self.teacher.fingerprint}

    def compute(self, batch: EmbeddedBatch) -> ObjectiveValue:
        """Return the loss, and the mean cosine with the teacher's embeddings."""
        told = self.teacher.embed(batch, ())
        cosines_b = _cosines(batch.queries_bd, told.queries_bg) + _cosines(
            batch.documents_bd, told.documents_bg
        )
        value = batch.mean_over_rows(
            (2 - cosines_b).sum(), {"teacher_cosine": cosines_b.detach().sum() / 2}
        )
        return self.with_contrast(batch, value, "match_loss")


def _cosines(student_bd: Tensor, teacher_bd: Tensor) -> Tensor:
    """Return the cosines of rows; the teacher's have unit length."""
    dtype = torch.promote_types(student_bd.dtype, torch.float32)
    return (F.normalize(student_bd.to(dtype), dim=1) * teacher_bd.to(dtype)).sum(1)
