"""CoSENT and AnglE: of two pairs, the one with the higher label is to be the more similar.

Shapes: N pairs of all ranks, d embedding width.

The slow version, which the tests compare with (s are the similarities, y the labels):

    differences_NN = scale * (s_N[:, None] - s_N[None, :])
    loss = log(1 + exp(differences_NN[y_N[:, None] < y_N[None, :]]).sum())

It looks at N x N numbers; the fast one sorts. Behind each pair j stands one sum, over the pairs
with a lower label, and a running log-sum-exp along the order of labels has all of them:

    log sum over i with y_i < y_j of exp(scale * (s_i - s_j))
        = running_logsumexp(scale * s)[number of pairs with y < y_j] - scale * s_j

That takes N log N steps and memory of N numbers. Pairs with the same label share the number, so
that ties are exact.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Float64Array
from largebatch.errors import UserError
from largebatch.transfer import to_device


class LabelOrder(NamedTuple):
    """The pairs in the order of their labels."""

    order: Tensor
    """`[N]` int64, the pairs from the lowest label to the highest."""
    num_lower: Tensor
    """`[N]` int64, in that order: how many pairs have a lower label."""
    num_compared: int
    """Pairs of pairs whose labels differ."""

    @classmethod
    def of(cls, labels_N: Float64Array, device: torch.device) -> "LabelOrder":
        """Sort labels, on the host: nothing waits for the device."""
        order_N = np.argsort(labels_N, kind="stable")
        sorted_N = labels_N[order_N]
        lower_N = np.searchsorted(sorted_N, sorted_N, side="left").astype(np.int64)
        return cls(to_device(order_N, device), to_device(lower_N, device), int(lower_N.sum()))


def cosent_loss(similarities_N: Tensor, labels: LabelOrder, scale: float) -> Tensor:
    """Return log(1 + the sum, over pairs i, j with y_i < y_j, of exp(scale * (s_i - s_j))).

    Args:
        similarities_N: Of query and document of each pair.
        labels: The order that they should have.
        scale: Inverse temperature.

    0 if all labels are the same, with a gradient of 0.
    """
    logits_N = scale * similarities_N[labels.order]
    running_N = torch.logcumsumexp(logits_N, 0)
    has_lower_N = labels.num_lower > 0
    # The first group has nothing below it. What stands in its place is left out below, so that no
    # infinity meets another in the backward pass.
    terms_N = running_N[(labels.num_lower - 1).clamp(min=0)] - logits_N
    terms_N = terms_N.masked_fill(~has_lower_N, -torch.inf)
    loss: Tensor = torch.cat([terms_N.new_zeros(1), terms_N]).logsumexp(0)
    return loss


def cosines(queries_bd: Tensor, documents_bd: Tensor) -> Tensor:
    """Return the cosine of each pair, `[b]`."""
    return torch.cosine_similarity(queries_bd, documents_bd, dim=1)


def angle_similarities(queries_bd: Tensor, documents_bd: Tensor) -> Tensor:
    """Return AnglE's similarity of each pair, `[b]` (arXiv 2309.12871).

    The halves of an embedding are the real and the imaginary part of a complex vector. The
    similarity is |sum of the real and imaginary parts of x conj(y)| / (|x| |y|).

    Raises:
        UserError: The width is odd.
    """
    width = queries_bd.shape[1]
    if width % 2:
        raise UserError(
            f"objective.sts.kind=angle cuts an embedding into two halves, and its width {width} is "
            "odd; use objective.sts.kind=cosent, or a pooling of another width"
        )
    real_q, imaginary_q = queries_bd.chunk(2, dim=1)
    real_d, imaginary_d = documents_bd.chunk(2, dim=1)
    real = real_q * real_d + imaginary_q * imaginary_d
    imaginary = imaginary_q * real_d - real_q * imaginary_d
    norms_b = queries_bd.norm(dim=1) * documents_bd.norm(dim=1)
    floor = torch.finfo(norms_b.dtype).tiny
    similarities_b: Tensor = (real + imaginary).sum(1).abs() / norms_b.clamp(min=floor)
    return similarities_b
