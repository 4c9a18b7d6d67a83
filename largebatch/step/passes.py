"""The passes of a step through the encoder: first passes, and gradients pushed into the weights.

Between them a chunk is known by its random state, or by its graph if it keeps one. Where memory
runs out, the passes go on with smaller chunks, or with fewer graphs.

Shapes: n texts of a chunk, u distinct texts of the rank, d embedding width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from largebatch.batch import Chunk, Texts
from largebatch.errors import UserError
from largebatch.model.chunks import TextRows
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import free_cache
from largebatch.parallel.collectives import Collectives, Gathering
from largebatch.parallel.strategy import Backward, Spread
from largebatch.phases import phase
from largebatch.step.dropout import RandomState
from largebatch.step.memory import KeepPlan, StepMemory, graph_bytes
from largebatch.transfer import to_device

Result = TypeVar("Result")


class PlannedChunk(NamedTuple):
    """A chunk that is to be embedded."""

    rows: TextRows
    """`[n]`, which of the rank's texts are in it; none for a chunk that only fills up."""
    chunk: Chunk
    has_columns: bool
    """Whether one of its texts goes to the other ranks."""


class EmbeddedChunk(NamedTuple):
    """A chunk between its first pass and the push of its gradient into the weights."""

    chunk: Chunk
    rows_n: Tensor
    """`[n]` on the device, which of the rank's embeddings it makes."""
    state: RandomState
    """Before its first pass."""
    embeddings_nd: Tensor | None
    """With its graph. None: it keeps none, and is embedded again."""

    @property
    def kept_tokens(self) -> int:
        """Tokens whose graph is in memory, padding included."""
        return 0 if self.embeddings_nd is None else self.chunk.num_tokens


class EarlyGather:
    """Gathers the ranks' columns as soon as this rank's are embedded.

    Args:
        collectives: How ranks reach each other.
        counts: Columns of each rank.
        embeddings_ud: Of this rank's distinct texts; filled in chunk by chunk.
        columns: `[m]`, which of them are this rank's columns.
    """

    def __init__(
        self, collectives: Collectives, counts: list[int], embeddings_ud: Tensor, columns: TextRows
    ) -> None:
        self.columns = columns
        self.started: Gathering | None = None
        self._collectives = collectives
        self._counts = counts
        self._embeddings_ud = embeddings_ud

    def start_if_complete(self, left: Sequence[PlannedChunk]) -> None:
        """Start, unless it has begun or one of the chunks that are left holds a column."""
        # Nothing to gather is known to all ranks; one without texts would not come here.
        if any(self._counts) and self.started is None and not any(o.has_columns for o in left):
            with phase("gather"):
                columns_m = to_device(self.columns, self._embeddings_ud.device)
                self.started = self._collectives.start_gather(
                    self._embeddings_ud[columns_m], self._counts
                )


class StepMustBeDoneAgain(Exception):  # noqa: N818 (it states what all ranks do next)
    """Memory ran out on some rank while gradients were pushed into the weights."""


def do_until_done(
    step: Callable[..., Result],
    modules: Iterable[nn.Module],
    *,
    device: torch.device,
    can_redo: bool,
) -> Result:
    """Return what a step gives, done again with less memory as often as it says so.

    Args:
        step: Takes `can_redo`, and raises StepMustBeDoneAgain on all ranks or on none.
        modules: Whose gradients are then forgotten.
        device: Whose random state is then restored.
        can_redo: Whether the strategy can take a step back. A gradient from before can't be told
            from what was added to it, so there must be none.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    can_redo = can_redo and all(parameter.grad is None for parameter in parameters)
    before = RandomState.of(device)
    while True:
        try:
            return step(can_redo=can_redo)
        except StepMustBeDoneAgain:
            pass
        # Out here nothing holds the graphs any more.
        for parameter in parameters:
            parameter.grad = None
        before.restore()


class Passes:
    """Runs a rank's chunks through the encoder, within the memory that there is.

    Args:
        encoder: Makes the chunks.
        memory: How large chunks may be, and how many keep their graph.
        strategy: How the encoder is spread over ranks.
    """

    def __init__(self, encoder: Encoder, memory: StepMemory, strategy: Spread) -> None:
        self._encoder = encoder
        self._memory = memory
        self._strategy = strategy
        self._collectives = strategy.collectives
        self._equal_chunks = strategy.equal_chunks
        self._gathers_early = self._collectives.world.size > 1 and not self._equal_chunks

    def plan(self, texts: Texts, columns: TextRows) -> list[PlannedChunk]:
        """Return the chunks of a rank's texts, those with the longest texts first.

        Where columns are gathered early, chunks that hold one of `columns` come before all others.
        """
        return self._cut(texts, np.arange(texts.num_texts), columns)

    def embed(
        self,
        texts: Texts,
        chunks: Sequence[PlannedChunk],
        num_chunks: int,
        embeddings_ud: Tensor,
        gather: EarlyGather,
    ) -> list[EmbeddedChunk] | None:
        """Fill in the embeddings and return what is known of each chunk.

        None: no smaller chunk is possible. The rank goes on with what it has, until `push`, where
        it can tell the others.

        Args:
            texts: This rank's.
            chunks: What `plan` returned for them.
            num_chunks: The most that any rank has. Where all must run as many, those that have
                fewer fill up with chunks of one token and no rows.
            embeddings_ud: Gets the embedding of each text.
            gather: Is told when all columns are embedded.

        Where memory runs out, the chunks that are left are cut smaller, and no graph is kept.

        Raises:
            UserError: Memory ran out where all ranks must run as many chunks. On all ranks: not
                even one text's graph fits, if a graph is measured.
        """
        if self._memory.must_be_measured:
            chunks = self._measure(texts, chunks, gather.columns)
        if self._equal_chunks:
            chunks = [*chunks, *[_filler(self._encoder)] * (num_chunks - len(chunks))]
        passes: list[EmbeddedChunk] = []
        left = list(zip(chunks, self._keeps(chunks), strict=True))
        while left:
            (planned, keeps_graph), *after = left
            state = RandomState.of(self._encoder.device)
            one = self._embed_one(planned, state, embeddings_ud, keeps_graph=keeps_graph)
            if one is not None:
                passes.append(one)
                left = after
                if self._gathers_early:
                    gather.start_if_complete([planned for planned, _ in left])
                continue
            state.restore()
            kept_tokens = sum(one.kept_tokens for one in passes)
            kept_tokens += planned.chunk.num_tokens if keeps_graph else 0
            if not self._memory.take_less(kept_tokens, max_texts=len(planned.rows)):
                return None
            passes = [one._replace(embeddings_nd=None) for one in passes]
            rows = np.concatenate([planned.rows for planned, _ in left])
            smaller = self._cut(texts.take(rows), rows, gather.columns)
            left = [(planned, False) for planned in smaller]
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
                self._push(passes or (), gradients_ud, backward)
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
                sum(one.kept_tokens for one in passes),
                max_texts=max(len(one.rows_n) for one in passes),
            )
        )
        with phase("sync"):
            worst = self._collectives.highest(out_of_memory + hopeless)
        if worst == 2:
            raise UserError(self._memory.ran_out())
        if worst == 1:
            raise StepMustBeDoneAgain

    def _push(
        self, passes: Sequence[EmbeddedChunk], gradients_ud: Tensor, backward: Backward
    ) -> None:
        replayed = [one for one in passes if one.embeddings_nd is None]
        kept = [
            (one.embeddings_nd, _gradient_of(one, one.embeddings_nd, gradients_ud))
            for one in passes
            if one.embeddings_nd is not None
        ]
        backward([own for own, _ in kept], [gradient for _, gradient in kept], last=not replayed)
        for number, one in enumerate(replayed, start=1):
            with one.state.replayed():
                embeddings_nd = self._forward(one.chunk)
            gradient_nd = _gradient_of(one, embeddings_nd, gradients_ud)
            backward([embeddings_nd], [gradient_nd], last=number == len(replayed))

    def _forward(self, chunk: Chunk) -> Tensor:
        embeddings_nd: Tensor = self._strategy.run(self._encoder, chunk)
        return embeddings_nd

    def _cut(self, texts: Texts, rows: TextRows, columns: TextRows) -> list[PlannedChunk]:
        """Return the chunks of some texts; `rows` says which of the rank's texts each is."""
        assert self._memory.tokens_per_chunk is not None
        plan, chunks = self._encoder.make_chunks(texts, self._memory.tokens_per_chunk)
        is_column = np.isin(rows, columns)
        planned = [
            PlannedChunk(rows[own], chunk, bool(is_column[own].any()))
            for own, chunk in zip(plan, chunks, strict=True)
        ]
        if self._gathers_early:
            planned.sort(key=lambda one: not one.has_columns)
        return planned

    def _embed_one(
        self, planned: PlannedChunk, state: RandomState, embeddings_ud: Tensor, *, keeps_graph: bool
    ) -> EmbeddedChunk | None:
        """Return an embedded chunk; None: memory ran out."""
        rows_n = to_device(planned.rows, self._encoder.device)
        try:
            with phase("embed"), torch.set_grad_enabled(keeps_graph):
                embeddings_nd = self._forward(planned.chunk)
                embeddings_ud[rows_n] = embeddings_nd.detach()[: len(rows_n)]
        except torch.OutOfMemoryError:
            # Ranks that must do the same can't know of it in the midst of their passes.
            if self._equal_chunks:
                raise UserError(self._memory.ran_out()) from None
            return None
        return EmbeddedChunk(planned.chunk, rows_n, state, embeddings_nd if keeps_graph else None)

    def _keeps(self, chunks: Sequence[PlannedChunk]) -> list[bool]:
        """Return whether each chunk keeps its graph."""
        tokens = [planned.chunk.num_tokens for planned in chunks]
        if self._equal_chunks:
            # Ranks differ in their chunks' tokens, but must keep the same ones.
            assert self._memory.tokens_per_chunk is not None
            tokens = [self._memory.tokens_per_chunk] * len(chunks)
        return self._memory.keeps(tokens)

    def _measure(
        self, texts: Texts, chunks: Sequence[PlannedChunk], columns: TextRows
    ) -> Sequence[PlannedChunk]:
        """Measure what a graph holds, and return the chunks, cut smaller if memory ran out.

        Raises:
            UserError: On all ranks, if one text is too much for one of them.
        """
        bytes_per_token = self._bytes_per_token(chunks)
        while (
            bytes_per_token is None
            and chunks
            and self._memory.take_less(0, max_texts=len(chunks[0].rows))
        ):
            chunks = self.plan(texts, columns)
            bytes_per_token = self._bytes_per_token(chunks)
        if self._collectives.highest(bytes_per_token is None):
            raise UserError(self._memory.ran_out())
        assert bytes_per_token is not None
        budget = self._memory.budget_bytes(self._encoder, bytes_per_token, self._strategy)
        self._memory.keep_plan = KeepPlan(bytes_per_token, budget).agreed(self._collectives)
        return chunks

    def _bytes_per_token(self, chunks: Sequence[PlannedChunk]) -> float | None:
        """Return what the first chunk's graph holds for a token; None: memory ran out."""
        chunk = (chunks[0] if chunks else _filler(self._encoder)).chunk

        try:
            with RandomState.of(self._encoder.device).replayed():
                held = graph_bytes(self._forward, chunk, list(self._encoder.parameters()))
                return held / chunk.num_tokens
        except torch.OutOfMemoryError:
            if self._equal_chunks:
                raise UserError(self._memory.ran_out()) from None
        # Only out here does the error no longer hold the graph.
        free_cache(self._encoder.device)
        return None


def _filler(encoder: Encoder) -> PlannedChunk:
    one_token = Texts.from_lists([[encoder.pad_id]])
    (chunk,) = encoder.make_chunks(one_token, 1)[1]
    return PlannedChunk(np.empty(0, np.intp), chunk, has_columns=False)


def _gradient_of(one: EmbeddedChunk, embeddings_nd: Tensor, gradients_ud: Tensor) -> Tensor:
    if len(one.rows_n) == 0:
        return torch.zeros_like(embeddings_nd)
    return gradients_ud[one.rows_n]
