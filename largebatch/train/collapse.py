"""Whether embeddings collapse: onto one point, or into a few of their dimensions."""

import torch

from largebatch.losses.geometry import alignment, effective_rank, uniformity
from largebatch.parallel.collectives import Collectives
from largebatch.step.sample import EmbeddingSample

FEW_DIMENSIONS = 4.0
"""Effective rank below which a person is told, where there could be four times as many."""
ALL_ALIKE = -0.01
"""Uniformity above which all embeddings are nearly equal: cosines of 0.9975 on average."""


@torch.no_grad()
def look_at(sample: EmbeddingSample, collectives: Collectives) -> dict[str, float]:
    """Return train/alignment, train/uniformity and train/effective_rank of all ranks' rows.

    Uniformity is the mean of queries' and documents'; the rank is that of all together. All ranks
    must call it; one gather, and the device is waited for. Of less than two pairs nothing is known.
    """
    if sum(sample.counts) < 2:
        return {}
    width = sample.queries_rd.shape[1]
    both = torch.cat([sample.queries_rd, sample.documents_rd], dim=1)
    rows = collectives.gather_rows(both, sample.counts).rows
    if not bool(rows.isfinite().all()):
        return {}  # told by whoever checks the loss
    queries, documents = rows.float().split(width, dim=1)
    return {
        "train/alignment": float(alignment(queries, documents)),
        "train/uniformity": float(uniformity(queries) + uniformity(documents)) / 2,
        "train/effective_rank": float(effective_rank(torch.cat([queries, documents]))),
    }


def why_collapsed(values: dict[str, float], *, most: int) -> str | None:
    """Return what a person should be told of values of `look_at`; None: nothing.

    Args:
        values: What it gave.
        most: The highest rank that there could be, the width or the number of rows.
    """
    if not values:
        return None
    rank, spread = values["train/effective_rank"], values["train/uniformity"]
    if spread > ALL_ALIKE:
        what = f"all embeddings are nearly equal (train/uniformity={spread:.4f}, where 0 is equal)"
    elif rank < FEW_DIMENSIONS <= most / 4:
        what = (
            f"the embeddings span {rank:.1f} dimensions of the {most} that they could "
            "(train/effective_rank)"
        )
    else:
        return None
    return (
        f"the model collapses: {what}; lower optim.lr, lengthen schedule.warmup_steps, or look at "
        "the data: every query must have a document of its own"
    )
