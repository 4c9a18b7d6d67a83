"""Chunks: texts sorted by length and cut by a token budget, padded or packed without padding."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largebatch.batch import Chunk, IntArray, LengthGroup, Packing, Texts
from largebatch.transfer import to_device

TextRows = npt.NDArray[np.intp]


IGNORED = -100
"""Target of a token of which nothing is predicted, as cross_entropy has it."""


class TokenChunk(NamedTuple):
    """A chunk with what is to be predicted of its tokens."""

    chunk: Chunk
    targets: dict[str, Tensor]
    """By name, int64 in the shape of the chunk's tokens; `IGNORED` where nothing is predicted, and
    in all padding."""
    places: dict[str, Tensor]
    """By name, int64 `[p]`: which of the chunk's tokens, rows one after another, have a target. The
    host knows them, so that nobody must ask the device."""
    lengths: IntArray
    """`[n]` tokens of each text, on the host, longest first; 0 for one that counts for nothing."""

    @property
    def num_texts(self) -> int:
        """How many texts there are."""
        return len(self.lengths)


def plan_chunks(
    lengths: npt.NDArray[Any], tokens_per_chunk: int, *, multiple: int = 1, packed: bool = False
) -> list[TextRows]:
    """Return the rows of each chunk, longest texts first.

    Args:
        lengths: `[n]` tokens of each text.
        tokens_per_chunk: Most tokens in a chunk, padding included (rows times the longest row). A
            single text that is longer than this is a chunk of its own.
        multiple: What the padded length is rounded up to.
        packed: Whether the chunks will be packed, so that there is no padding to count.

    Every row is in exactly one chunk. The longest chunk comes first, so that memory runs out at
    once or never.

    >>> [rows.tolist() for rows in plan_chunks(np.array([2, 8, 3, 1]), 8)]
    [[1], [2, 0], [3]]
    >>> [rows.tolist() for rows in plan_chunks(np.array([2, 8, 3, 1]), 8, packed=True)]
    [[1], [2, 0, 3]]
    """
    order = np.argsort(-lengths, kind="stable")
    # A packed text without any token still takes one place.
    sizes = np.maximum(lengths[order].astype(np.int64), 1)
    ends = np.cumsum(sizes)
    chunks: list[TextRows] = []
    start = 0
    while start < len(order):
        if packed:
            before = int(ends[start] - sizes[start])
            stop = int(np.searchsorted(ends, before + tokens_per_chunk, side="right"))
        else:
            stop = start + tokens_per_chunk // _round_up(int(sizes[start]), multiple)
        stop = min(max(stop, start + 1), len(order))
        chunks.append(order[start:stop])
        start = stop
    return chunks


def pad_chunks(
    texts: Texts, plan: Sequence[TextRows], *, pad_id: int, device: torch.device, multiple: int = 1
) -> Iterator[Chunk]:
    """Make the chunks of a plan one by one, each padded on the right to its longest text.

    The length is rounded up to a multiple of `multiple`.
    """
    for own in _split(texts, plan):
        yield _pad(own, pad_id, device, multiple)


def pack_chunks(
    texts: Texts,
    plan: Sequence[TextRows],
    *,
    pad_id: int,
    device: torch.device,
    skipped_position: int | None = None,
) -> Iterator[Chunk]:
    """Make the chunks of a plan one by one, each as one row without padding.

    Args:
        texts: All texts.
        plan: Rows of each chunk, sorted by length.
        pad_id: Stands, masked, for a text without any token.
        device: Where the chunks go.
        skipped_position: RoBERTa's kind counts positions from behind this one, which is that of
            its padding token, also where a text holds it: it is the token's id as well. None:
            positions are counted from 0, whatever the tokens.
    """
    for own in _split(texts, plan):
        yield _pack(own, pad_id, device, skipped_position)


def _split(texts: Texts, plan: Sequence[TextRows]) -> Iterator[Texts]:
    """Yield the texts of each chunk."""
    if not plan:
        return
    ordered = texts.take(np.concatenate(plan))
    ends = np.cumsum([len(rows) for rows in plan])
    token_ends = np.cumsum(ordered.lengths, dtype=np.int64)[ends - 1]
    for tokens, lengths in zip(
        np.split(ordered.tokens, token_ends[:-1]),
        np.split(ordered.lengths, ends[:-1]),
        strict=True,
    ):
        yield Texts(tokens, lengths)


def _pad(texts: Texts, pad_id: int, device: torch.device, multiple: int) -> Chunk:
    columns = np.arange(_round_up(int(texts.lengths.max(initial=1)), multiple))
    mask = columns < texts.lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = texts.tokens
    return Chunk(
        to_device(ids, device),
        to_device(mask.astype(np.int64), device),
        padded=not mask.all(),
    )


def _pack(texts: Texts, pad_id: int, device: torch.device, skipped_position: int | None) -> Chunk:
    lengths = texts.lengths.astype(np.int64)
    places = np.maximum(lengths, 1)
    assert (np.diff(places) <= 0).all(), "a packed chunk is sorted by length"
    boundaries = np.concatenate([[0], np.cumsum(places)])
    mask = np.repeat(lengths > 0, places)
    ids = np.full(len(mask), pad_id, np.int64)
    ids[mask] = texts.tokens
    if skipped_position is None:
        position_ids = np.arange(len(mask)) - np.repeat(boundaries[:-1], places)
    else:
        counted = ids != skipped_position
        before = np.concatenate([[0], np.cumsum(counted)])[:-1]
        number = before - np.repeat(before[boundaries[:-1]], places) + 1
        position_ids = skipped_position + np.where(counted, number, 0)
    different, num_texts = np.unique(places, return_counts=True)
    return Chunk(
        to_device(ids[None], device),
        to_device(mask[None].astype(np.int64), device),
        Packing(
            to_device(position_ids[None], device),
            to_device(boundaries.astype(np.int32), device),
            tuple(
                LengthGroup(int(n), int(length))
                for n, length in zip(num_texts[::-1], different[::-1], strict=True)
            ),
        ),
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def lay_out(
    values: npt.NDArray[Any], texts: Texts, chunk: Chunk, *, fill: int
) -> npt.NDArray[np.int64]:
    """Return numbers of tokens in the shape of a chunk, on the host.

    Args:
        values: One for each token of `texts`.
        texts: The chunk's, in its order.
        chunk: Padded or packed.
        fill: Stands where no token is.
    """
    if chunk.packing is None:
        mask = np.arange(chunk.input_ids.shape[1]) < texts.lengths[:, None]
    else:
        # A text without any token still takes one place.
        mask = np.repeat(texts.lengths > 0, np.maximum(texts.lengths, 1))[None]
    out = np.full(mask.shape, fill, np.int64)
    out[mask] = values
    return out
