"""Distillation: a query's own candidates, its document and its negatives, as a teacher scores them.

Shapes: b rows, each with a document and any number of own negatives; n own negatives of all rows;
K columns, one for the document and one for each negative of the row that has most.

Scores stand in rows `[b, K]`, the document's first. What a row hasn't got is -inf in the student's
and the teacher's alike.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.transfer import to_device


class Candidates(NamedTuple):
    """Where the n own negatives of b rows stand in them."""

    owners_n: Tensor
    """int64, the row of each."""
    places_n: Tensor
    """int64, its column: 1 for the first of a row."""
    num_columns: int
    """K."""

    @classmethod
    def of(cls, counts: Int64Array, device: torch.device) -> "Candidates":
        """Return the places for the numbers of negatives of rows, `[b]`."""
        owners_n = np.repeat(np.arange(len(counts)), counts)
        places_n = 1 + np.arange(len(owners_n)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(
            to_device(owners_n, device), to_device(places_n, device), 1 + int(counts.max(initial=0))
        )

    def in_rows(self, documents_b: Tensor, negatives_n: Tensor) -> Tensor:
        """Return scores in the rows, `[b, K]`."""
        rows_bK = documents_b.new_full((len(documents_b), self.num_columns), -torch.inf)
        rows_bK[:, 0] = documents_b
        rows_bK[self.owners_n, self.places_n] = negatives_n
        return rows_bK


def student_scores(
    queries_bd: Tensor, documents_bd: Tensor, negatives_nd: Tensor, candidates: Candidates
) -> Tensor:
    """Return the dot product of each query and its candidates, `[b, K]`.

    float32 (float64 for such inputs) whatever the inputs are.
    """
    dtype = torch.promote_types(queries_bd.dtype, torch.float32)
    queries_bd, documents_bd = queries_bd.to(dtype), documents_bd.to(dtype)
    of_negatives_n = (queries_bd[candidates.owners_n] * negatives_nd.to(dtype)).sum(1)
    return candidates.in_rows((queries_bd * documents_bd).sum(1), of_negatives_n)


def kl_divergence(
    scores_bK: Tensor, teacher_bK: Tensor, scale: Tensor, teacher_temperature: float
) -> Tensor:
    """Return KL(softmax(teacher / T_t) || softmax(scale * scores)) of each row, `[b]`.

    Args:
        scores_bK: The student's.
        teacher_bK: The teacher's, without a gradient.
        scale: Scalar, 1 / the student's temperature.
        teacher_temperature: T_t.

    With a gradient it is what a cross-entropy against softmax(teacher / T_t) is (FlagEmbedding):
    the two differ by the teacher's entropy. No factor of a temperature stands before it (SimLM,
    arXiv 2207.02578); sentence-transformers multiplies by the square of the student's.
    """
    absent_bK = scores_bK.isneginf()
    # Not -inf times the scale, whose gradient would be NaN.
    logits_bK = (scale * scores_bK.masked_fill(absent_bK, 0)).masked_fill(absent_bK, -torch.inf)
    log_student_bK = F.log_softmax(logits_bK, 1).masked_fill(absent_bK, 0)
    log_teacher_bK = F.log_softmax(teacher_bK / teacher_temperature, 1)
    share_bK = log_teacher_bK.exp()
    return (share_bK * (log_teacher_bK.masked_fill(absent_bK, 0) - log_student_bK)).sum(1)


def margin_errors(scores_bK: Tensor, teacher_bK: Tensor) -> Tensor:
    """Return MarginMSE of each row, `[b]` (arXiv 2010.02666).

    That is the mean, over the row's negatives, of the squared difference between the student's
    margin, document over negative, and the teacher's. Raw scores, no temperature. 0 for a row
    without negatives.
    """
    absent_bk = scores_bK[:, 1:].isneginf()
    margins_bk = scores_bK[:, :1] - scores_bK[:, 1:].masked_fill(absent_bk, 0)
    wanted_bk = teacher_bK[:, :1] - teacher_bK[:, 1:].masked_fill(absent_bk, 0)
    errors_bk = (margins_bk - wanted_bk).square().masked_fill(absent_bk, 0)
    return errors_bk.sum(1) / (~absent_bk).sum(1).clamp(min=1)
