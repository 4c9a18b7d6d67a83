"""The passes of a step through the encoder: first passes, and gradients pushed into the weights.

Between them a chunk is known by its random state and by what it keeps. Where memory runs out, the
passes go on with smaller chunks, or with less that is kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Chunk, Texts
from largebatch.errors import UserError
from largebatch.model.chunks import Rows
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import free_cache
from largebatch.parallel.collectives import Collectives, Gathering
from largebatch.parallel.strategy import Backward, Strategy
from largebatch.phases import phase
from largebatch.step.dropout import RandomState
from largebatch.step.keep import LevelCost, embed_keeping, measure_levels, time_levels
from largebatch.step.memory import KeepPlan, StepMemory
from largebatch.transfer import to_device


class PlannedChunk(NamedTuple):
    """A chunk that is to be embedded."""

    rows: Rows
    """`[n]`, which of the rank's texts are in it; none for a chunk that only fills up."""
    chunk: Chunk
    has_columns: bool
    """Whether one of its texts is a document or negative of this rank."""


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

    def forgotten(self) -> "EmbeddedChunk":
        """Return it with nothing kept."""
        return self._replace(level="none", embeddings_nd=self.embeddings_nd.detach())


class Sending:
    """Sends this rank's columns to all others as soon as they are embedded.

    Args:
        collectives: How ranks reach each other.
        counts: Columns of each rank.
        embeddings_ud: Of this rank's distinct texts; filled in chunk by chunk.
        columns: `[m]`, which of them are this rank's columns.
    """

    def __init__(
        self, collectives: Collectives, counts: list[int], embeddings_ud: Tensor, columns: Rows
    ) -> None:
        self.columns = columns
        self.started: Gathering | None = None
        self._collectives = collectives
        self._counts = counts
        self._embeddings_ud = embeddings_ud

    def start_if_complete(self, left: Sequence[PlannedChunk]) -> None:
        """Start, unless it has begun or one of the chunks that are left holds a column."""
        if self.started is None and not any(one.has_columns for one in left):
            with phase("gather"):
                columns_m = to_device(self.columns, self._embeddings_ud.device)
                self.started = self._collectives.start_gather(
                    self._embeddings_ud[columns_m], self._counts
                )


class StepMustBeDoneAgain(Exception):  # noqa: N818 (it states what all ranks do next)
    """Memory ran out on some rank while gradients were pushed into the weights."""


class Passes:
    """Runs a rank's chunks through the encoder, within the memory that there is.

    Args:
        encoder: Makes the chunks.
        memory: How large chunks may be, and what they may keep.
        collectives: How ranks reach each other.
        strategy: How the model is spread over ranks. None: every rank holds all of it.
    """

    def __init__(
        self,
        encoder: Encoder,
        memory: StepMemory,
        collectives: Collectives,
        strategy: Strategy | None,
    ) -> None:
        self._encoder = encoder
        self._memory = memory
        self._collectives = collectives
        self._strategy = strategy
        self._equal_chunks = strategy is not None and strategy.equal_chunks
        self._sends_early = collectives.world.size > 1 and not self._equal_chunks

    @property
    def can_redo(self) -> bool:
        """Whether a step can be taken back in its midst."""
        return self._strategy is None or self._strategy.can_redo

    def plan(self, texts: Texts, columns: Rows) -> list[PlannedChunk]:
        """Return the chunks of a rank's texts, those with the longest texts first.

        Where columns are sent early, chunks that hold one of `columns` come before all others.
        """
        return self._cut(texts, np.arange(texts.num_texts), columns)

    def embed(
        self,
        texts: Texts,
        chunks: Sequence[PlannedChunk],
        most_chunks: int,
        embeddings_ud: Tensor,
        sending: Sending,
    ) -> list[EmbeddedChunk] | None:
        """Fill in the embeddings and return what is known of each chunk.

        None: no smaller chunk is possible. The rank goes on with what it has, until `push`, where
        it can tell the others.

        Args:
            texts: This rank's.
            chunks: What `plan` returned for them.
            most_chunks: That any rank has. Where all must run as many, those that have fewer fill
                up with chunks of one token and no rows.
            embeddings_ud: Gets the embedding of each text.
            sending: Is told when all columns are embedded.

        Where memory runs out, the chunks that are left are cut smaller, and nothing is kept.

        Raises:
            UserError: Memory ran out where all ranks must run as many chunks. On all ranks: not
                even one text's graph fits, of those that are measured.
        """
        if self._memory.must_be_measured:
            chunks = self._measure(texts, chunks, sending.columns)
        if self._equal_chunks:
            chunks = [*chunks, *[_filler(self._encoder)] * (most_chunks - len(chunks))]
        passes: list[EmbeddedChunk] = []
        left = list(zip(chunks, self._levels(chunks), strict=True))
        while left:
            (planned, level), *after = left
            state = RandomState.of(self._encoder.device)
            one = self._embed_one(planned, level, state, embeddings_ud)
            if one is not None:
                passes.append(one)
                left = after
                if self._sends_early:
                    sending.start_if_complete([planned for planned, _ in left])
                continue
            state.restore()
            held = [(one.level, one.chunk.num_tokens) for one in passes]
            held.append((level, planned.chunk.num_tokens))
            if not self._memory.take_less(held, most_texts=len(planned.rows)):
                return None
            passes = [one.forgotten() for one in passes]
            rows = np.concatenate([planned.rows for planned, _ in left])
            smaller = self._cut(texts.take(rows), rows, sending.columns)
            left = [(planned, "none") for planned in smaller]
        return passes

    def push(
        self,
        passes: Sequence[EmbeddedChunk] | None,
        gradients_ud: Tensor,
        backward: Backward,
        *,
        can_redo: bool,
    ) -> None:
        """Push the embeddings' gradients into the weights.

        Args:
            passes: What `embed` returned.
            gradients_ud: Of the embeddings.
            backward: The strategy's.
            can_redo: Whether `.grad` may be forgotten, and the step done again.

        Raises:
            StepMustBeDoneAgain: On all ranks, if memory ran out on any. What that rank has pushed
                can't be told from what it has not, and smaller chunks have other dropout masks.
            UserError: Memory ran out, and the step can't be done again, or not with less. On all
                ranks, unless others are in the midst of passes that wait for this one.
        """
        out_of_memory = passes is None
        try:
            with phase("replay"):
                push(passes or (), gradients_ud, self._forward, backward)
        except torch.OutOfMemoryError:
            out_of_memory = True
        if self._equal_chunks:
            if out_of_memory:
                raise UserError(self._memory.ran_out())
            return
        hopeless = out_of_memory and not (
            can_redo
            and passes
            and self._memory.take_less(
                [(one.level, one.chunk.num_tokens) for one in passes],
                most_texts=max(len(one.rows_n) for one in passes),
            )
        )
        with phase("sync"):
            worst = self._collectives.highest(out_of_memory + hopeless)
        if worst == 2:
            raise UserError(self._memory.ran_out())
        if worst == 1:
            raise StepMustBeDoneAgain

    @property
    def _forward(self) -> Callable[[Chunk], Tensor]:
        return self._encoder if self._strategy is None else self._strategy.encoder

    def _cut(self, texts: Texts, rows: Rows, columns: Rows) -> list[PlannedChunk]:
        """Return the chunks of some texts; `rows` says which of the rank's texts each is."""
        assert self._memory.tokens_per_chunk is not None
        plan, chunks = self._encoder.make_chunks(texts, self._memory.tokens_per_chunk)
        is_column = np.isin(rows, columns)
        planned = [
            PlannedChunk(rows[own], chunk, bool(is_column[own].any()))
            for own, chunk in zip(plan, chunks, strict=True)
        ]
        if self._sends_early:
            planned.sort(key=lambda one: not one.has_columns)
        return planned

    def _embed_one(
        self, planned: PlannedChunk, level: str, state: RandomState, embeddings_ud: Tensor
    ) -> EmbeddedChunk | None:
        """Return an embedded chunk; None: memory ran out."""
        rows_n = to_device(planned.rows, self._encoder.device)
        try:
            with phase("embed"):
                embeddings_nd = embed_keeping(self._forward, planned.chunk, level)
                embeddings_ud[rows_n] = embeddings_nd.detach()[: len(rows_n)]
        except torch.OutOfMemoryError:
            # Ranks that must do the same can't know of it in the midst of their passes.
            if self._equal_chunks:
                raise UserError(self._memory.ran_out()) from None
            return None
        return EmbeddedChunk(planned.chunk, rows_n, level, state, embeddings_nd)

    def _levels(self, chunks: Sequence[PlannedChunk]) -> list[str]:
        """Return what each chunk keeps."""
        tokens = [planned.chunk.num_tokens for planned in chunks]
        if self._equal_chunks:
            # Ranks differ in their chunks' tokens, but must keep the same ones.
            assert self._memory.tokens_per_chunk is not None
            tokens = [self._memory.tokens_per_chunk] * len(chunks)
        return self._memory.levels(tokens)

    def _measure(
        self, texts: Texts, chunks: Sequence[PlannedChunk], columns: Rows
    ) -> Sequence[PlannedChunk]:
        """Measure what it costs to keep, and return the chunks, cut smaller if memory ran out.

        Raises:
            UserError: On all ranks, if one text is too much for one of them.
        """
        costs = self._costs(chunks)
        while (
            costs is None
            and chunks
            and self._memory.take_less(
                [("none", chunks[0].chunk.num_tokens)], most_texts=len(chunks[0].rows)
            )
        ):
            chunks = self.plan(texts, columns)
            costs = self._costs(chunks)
        if self._collectives.highest(costs is None):
            raise UserError(self._memory.ran_out())
        assert costs is not None
        budget = self._memory.budget_bytes(self._encoder, costs, self._strategy)
        self._memory.keep_plan = KeepPlan(costs, budget).agreed(self._collectives)
        return chunks

    def _costs(self, chunks: Sequence[PlannedChunk]) -> dict[str, LevelCost] | None:
        """Return what each level costs on the first chunk; None: memory ran out."""
        chunk = (chunks[0] if chunks else _filler(self._encoder)).chunk
        parameters = list(self._encoder.parameters())
        try:
            with RandomState.of(self._encoder.device).replayed():
                costs = measure_levels(self._forward, chunk, parameters)
                if self._memory.keep == "auto" and self.can_redo:
                    # Elsewhere a backward pass does more than return gradients.
                    seconds = time_levels(self._forward, chunk, parameters)
                    costs = {
                        level: cost._replace(seconds_per_token=seconds[level] / chunk.num_tokens)
                        for level, cost in costs.items()
                    }
            return costs if math.isfinite(costs["none"].seconds_per_token) else None
        except torch.OutOfMemoryError:
            if self._equal_chunks:
                raise UserError(self._memory.ran_out()) from None
        # Only out here does the error no longer hold the graph.
        free_cache(self._encoder.device)
        return None


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


def _filler(encoder: Encoder) -> PlannedChunk:
    one_token = Texts.from_lists([[encoder.pad_id]])
    (chunk,) = encoder.make_chunks(one_token, 1)[1]
    return PlannedChunk(np.empty(0, np.intp), chunk, has_columns=False)


def _gradient_of(one: EmbeddedChunk, gradients_ud: Tensor) -> Tensor:
    if len(one.rows_n) == 0:
        return torch.zeros_like(one.embeddings_nd)
    return gradients_ud[one.rows_n]
