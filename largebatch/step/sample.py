"""Some of a step's embeddings, for whoever looks at them later.

Shapes: r rows of this rank, d embedding width.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from largebatch.step.objective import EmbeddedBatch

SAMPLE_PAIRS = 1024
"""About as many pairs of the global batch are kept, evenly spread over it."""


class EmbeddingSample(NamedTuple):
    """Pairs of a step, without a graph; nobody has waited for them."""

    queries_rd: Tensor
    documents_rd: Tensor
    """Each the positive of the query in the same row."""
    counts: list[int]
    """Rows of each rank."""


def sample_of(batch: "EmbeddedBatch") -> EmbeddingSample:
    """Return every k-th pair of each rank, k so that all ranks have about `SAMPLE_PAIRS`."""
    every = math.ceil(batch.num_pairs / SAMPLE_PAIRS)
    # Copies: a view would hold the embeddings of the whole batch.
    return EmbeddingSample(
        batch.queries_bd.detach()[::every].clone(),
        batch.documents_bd.detach()[::every].clone(),
        [math.ceil(one.num_pairs / every) for one in batch.facts],
    )
