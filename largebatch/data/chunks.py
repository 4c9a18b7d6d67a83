"""Chunks: texts sorted by length and cut by a token budget, so that almost nothing is padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from largebatch.batch import Chunk, Texts

Rows = npt.NDArray[np.intp]


def plan_chunks(lengths: npt.NDArray[Any], tokens_per_chunk: int) -> list[Rows]:
    """Return the rows of each chunk, longest texts first.

    Args:
        lengths: `[n]` tokens of each text.
        tokens_per_chunk: Most padded tokens (rows times the longest row) in a chunk. A single text
            that is longer than this is a chunk of its own.

    Every row is in exactly one chunk. The longest chunk comes first, so that memory runs out at
    once or never.

    >>> [rows.tolist() for rows in plan_chunks(np.array([2, 8, 3, 1]), 8)]
    [[1], [2, 0], [3]]
    """
    order = np.argsort(-lengths, kind="stable")
    chunks: list[Rows] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = min(start + max(tokens_per_chunk // longest, 1), len(order))
        chunks.append(order[start:stop])
        start = stop
    return chunks


def pad_chunks(
    texts: Texts, plan: Sequence[Rows], *, pad_id: int, device: torch.device
) -> list[Chunk]:
    """Return the chunks of a plan, each padded on the right to its longest text."""
    starts = np.cumsum(texts.lengths, dtype=np.int64) - texts.lengths
    return [_pad(texts, starts, rows, pad_id, device) for rows in plan]


def _pad(
    texts: Texts, starts: npt.NDArray[np.int64], rows: Rows, pad_id: int, device: torch.device
) -> Chunk:
    lengths = texts.lengths[rows]
    columns = np.arange(lengths.max(initial=1))
    mask = columns < lengths[:, None]
    positions = starts[rows][:, None] + columns
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = texts.tokens[positions[mask]]
    return Chunk(
        torch.from_numpy(ids).to(device, non_blocking=True),
        torch.from_numpy(mask.astype(np.int64)).to(device, non_blocking=True),
    )
