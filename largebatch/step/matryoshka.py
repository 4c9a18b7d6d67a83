"""Matryoshka: the first numbers of an embedding serve as a shorter one (arXiv 2205.13147, eq. 1).

A loss is taken at several widths, and what is minimized is their weighted sum. The encoder runs
once, embeddings are gathered once: shorter ones are cut from the gathered ones. For an embedding
objective, the whole of it:

    weighted = [
        weight * loss_of(truncated(batch, dim))  # a sum over this rank's rows
        for dim, weight in zip(dims, weights)
    ]
    return batch.mean_over_rows(sum(weighted), {})  # one reduction for all widths
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.step.objective import EmbeddedBatch


class Matryoshka(NamedTuple):
    """At which widths a loss is taken, and what each of them weighs."""

    dims: tuple[int, ...]
    """Widths, each at most that of the embeddings."""
    weights: tuple[float, ...]
    """As many."""

    @classmethod
    def of(
        cls, dims: Sequence[int], *, weights: Sequence[float] = (), reduction: str = "sum"
    ) -> "Matryoshka":
        """Return widths with the weights given, or 1 each (sum), or 1 / number of widths (mean)."""
        if not weights:
            weights = [1 / len(dims) if reduction == "mean" else 1.0] * len(dims)
        if len(weights) != len(dims):
            raise UserError(f"{len(dims)} widths need as many weights, got {len(weights)}")
        return cls(tuple(dims), tuple(weights))

    def check(self, encoder: Encoder) -> None:
        """Check that the encoder's embeddings have so many numbers.

        Raises:
            UserError: They have fewer.
        """
        width = encoder.embedding_width
        if wider := [dim for dim in self.dims if dim > width]:
            raise UserError(
                f"objective.matryoshka_dims has {', '.join(map(str, wider))}, and embeddings have "
                f"{width} numbers; leave out what is more"
            )


def truncated(batch: EmbeddedBatch, dim: int, *, normalize: bool = True) -> EmbeddedBatch:
    """Return a batch with the first `dim` numbers of its embeddings; gradients go through.

    Args:
        batch: Of any width of at least `dim`. At `dim` itself it is returned as it is.
        dim: How many numbers of an embedding stay.
        normalize: Whether what stays gets unit length again. It does if the encoder gives unit
            length; else an export that truncates would give other vectors than were trained.
    """
    if batch.queries_bd.shape[1] == dim:
        return batch

    def cut(embeddings_nd: Tensor) -> Tensor:
        short_nd = embeddings_nd[:, :dim]
        return F.normalize(short_nd, dim=1) if normalize else short_nd

    return batch._replace(
        queries_bd=cut(batch.queries_bd),
        documents_bd=cut(batch.documents_bd),
        negatives_nd=cut(batch.negatives_nd),
        gathered_md=None if batch.gathered_md is None else cut(batch.gathered_md),
    )
