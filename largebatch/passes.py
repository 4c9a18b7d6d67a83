"""The passes of a step through the encoder: what is known of each chunk between them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Chunk, Texts
from largebatch.data.chunks import Rows, take_texts
from largebatch.model.encoder import Encoder
from largebatch.model.keep import RandomState
from largebatch.parallel.collectives import Collectives, Gathering
from largebatch.parallel.strategy import Backward
from largebatch.phases import phase
from largebatch.transfer import to_device


class PlannedChunk(NamedTuple):
    """A chunk that is to be embedded."""

    rows: Rows
    """`[n]`, which of the rank's texts are in it; none for a chunk that only fills up."""
    chunk: Chunk

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return self.chunk.input_ids.numel()


class EmbeddedChunk(NamedTuple):
    """A chunk between its first pass and the push of its gradient into the weights."""

    chunk: Chunk
    rows_n: Tensor
    """`[n]` on the device, which of the rank's embeddings it makes."""
    level: str
    """What it keeps."""
    state: RandomState
    """Before its first pass."""
    embeddings_nd: Tensor
    """With a graph unless the level is none."""

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return self.chunk.input_ids.numel()

    def forgotten(self) -> "EmbeddedChunk":
        """Return it with nothing kept."""
        return self._replace(level="none", embeddings_nd=self.embeddings_nd.detach())


class Sending:
    """Sends this rank's columns to all others as soon as they are embedded.

    Args:
        collectives: How ranks reach each other.
        counts: Columns of each rank.
        embeddings_ud: Of this rank's distinct texts; filled in chunk by chunk.
        places: `[m]`, which of them are this rank's columns.
    """

    def __init__(
        self, collectives: Collectives, counts: list[int], embeddings_ud: Tensor, places: Rows
    ) -> None:
        self.places = places
        self.started: Gathering | None = None
        self._collectives = collectives
        self._counts = counts
        self._embeddings_ud = embeddings_ud
        self._is_column = np.zeros(len(embeddings_ud), np.bool_)
        self._is_column[places] = True

    def start_if_complete(self, left: Sequence[PlannedChunk]) -> None:
        """Start, unless it has begun or one of the chunks that are left holds a column."""
        if self.started is None and not any(self._is_column[one.rows].any() for one in left):
            with phase("gather"):
                places_m = to_device(self.places, self._embeddings_ud.device)
                self.started = self._collectives.start_gather(
                    self._embeddings_ud[places_m], self._counts
                )


def plan(
    encoder: Encoder, texts: Texts, rows: Rows, tokens_per_chunk: int, *, first: Rows | None = None
) -> list[PlannedChunk]:
    """Return the chunks of some texts, those with the longest texts first.

    Args:
        encoder: Makes the chunks.
        texts: All texts of this rank.
        rows: Which of them.
        tokens_per_chunk: Most tokens of a chunk.
        first: Rows whose chunks come before those that hold none of them.
    """
    plan_of_rows, chunks = encoder.make_chunks(take_texts(texts, rows), tokens_per_chunk)
    planned = [
        PlannedChunk(rows[own], chunk) for own, chunk in zip(plan_of_rows, chunks, strict=True)
    ]
    if first is not None:
        is_first = np.zeros(texts.num_texts, np.bool_)
        is_first[first] = True
        planned.sort(key=lambda one: not is_first[one.rows].any())
    return planned


def filler(encoder: Encoder) -> PlannedChunk:
    """Return a chunk of one token and no rows."""
    one_token = Texts.from_lists([[encoder.pad_id]])
    return PlannedChunk(np.empty(0, np.intp), encoder.make_chunks(one_token, 1)[1][0])


def push(
    passes: Sequence[EmbeddedChunk],
    gradients_ud: Tensor,
    forward: Callable[[Chunk], Tensor],
    backward: Backward,
) -> None:
    """Push the gradients of all embeddings into the weights."""
    kept = [one for one in passes if one.level != "none"]
    replayed = [one for one in passes if one.level == "none"]
    backward(
        [one.embeddings_nd for one in kept],
        [_gradient_of(one, gradients_ud) for one in kept],
        last=not replayed,
    )
    for number, one in enumerate(replayed, start=1):
        with one.state.replayed():
            embeddings_nd = forward(one.chunk)
        backward([embeddings_nd], [_gradient_of(one, gradients_ud)], last=number == len(replayed))


def _gradient_of(one: EmbeddedChunk, gradients_ud: Tensor) -> Tensor:
    if len(one.rows_n) == 0:
        return torch.zeros_like(one.embeddings_nd)
    return gradients_ud[one.rows_n]
