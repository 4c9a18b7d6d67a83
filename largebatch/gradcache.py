"""Gradient caching: the gradient of a global batch in the memory of one chunk (arXiv 2101.06983).

1. Embed every chunk, keeping for the backward pass what memory allows (see model/keep.py), and
   noting the random state before each chunk that keeps nothing.
2. Gather the embeddings of all ranks; loss; its gradient with respect to this rank's embeddings.
3. Push the embeddings' gradient into the weights: all chunks that kept something in one backward
   pass, then each other after restoring its random state and embedding it again.
4. Average the gradients over ranks, once.

The chain rule makes this equal to one backward pass over the whole global batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from largebatch.batch import Chunk, Texts
from largebatch.budget import GIB, KeepPlan, measured_budget
from largebatch.config import KEEPS
from largebatch.data.chunks import distinct_texts
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.model.encoder import Encoder
from largebatch.model.keep import RandomState, embed_keeping, measure_levels
from largebatch.objective import ContrastiveObjective, ObjectiveValue, hash_pairs
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import backward as backward_locally
from largebatch.parallel.ddp import one_reduction
from largebatch.parallel.strategy import Backward, Strategy
from largebatch.phases import phase

TextList = Sequence[str] | Sequence[Sequence[int]] | Texts
"""Texts, token lists, or packed tokens."""


class StepReport(NamedTuple):
    """What a call of GradCache found out on the way."""

    loss: Tensor
    """Scalar, the mean over the global batch, the same on all ranks, without a graph."""
    accuracy: Tensor
    """Scalar, the share of queries whose own document scores highest among all columns."""
    embeddings_finite: Tensor
    """Bool scalar, whether all of this rank's embeddings are finite."""
    num_tokens: int
    """Tokens of this rank's texts."""
    num_encoded_tokens: int
    """Those that went through the encoder: of identical texts only the first's."""
    num_padded_tokens: int
    """The same, padding included."""
    num_chunks: int
    """Chunks of this rank."""
    units: float
    """Work of the step's encoder passes: a forward pass is 1, a backward pass 2. So 4 with nothing
    kept, 3 with everything."""


class _Pass(NamedTuple):
    """A chunk on its way through a step."""

    chunk: Chunk
    rows_n: Tensor
    """`[n]`, which of the rank's embeddings it makes; none for a chunk that only fills up."""
    level: str
    state: RandomState
    embeddings_nd: Tensor
    """With a graph unless the level is none."""


class GradCache:
    """Puts the gradient of a global batch into `.grad` of an encoder and of a loss's temperature.

    Args:
        encoder: Embeds one chunk.
        loss: Contrasts the embeddings.
        tokens_per_chunk: Most tokens, padding included, that go through the encoder at once: what
            memory is spent on. The result doesn't depend on it, but for rounding.
        keep: What the first pass keeps for the backward pass. "none" embeds each chunk a second
            time, in the memory of one chunk. "layers" keeps a little of each layer and saves a
            third of that work, "products" keeps what is expensive to compute and saves all but a
            little of it, "all" keeps every chunk's graph, in the memory of a full batch. "auto"
            chooses by the memory that is free.
        keep_gib: Memory that may be held for the backward pass; chunks that don't fit keep less, or
            nothing. None: as much as it takes; for "auto" on a GPU: what is free.
        strategy: How the model is spread over ranks. None: every rank holds all of it, and one
            all-reduce averages the gradients.

    Under torchrun each rank passes its own part of the global batch; parts may differ in size and
    may be empty on some ranks. All ranks must call it.

    Raises:
        UserError: An option is not what it must be; when called: "auto" without a GPU and
            without `keep_gib`.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ContrastiveLoss,
        *,
        tokens_per_chunk: int = 16384,
        keep: str = "none",
        keep_gib: float | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        if tokens_per_chunk < 1:
            raise UserError(f"tokens_per_chunk={tokens_per_chunk} must be at least 1")
        if keep not in KEEPS:
            raise UserError(f"keep={keep!r} is not one of {', '.join(KEEPS)}")
        if keep_gib is not None and keep_gib < 0:
            raise UserError(f"keep_gib={keep_gib} must be at least 0")
        self.encoder = encoder
        self.loss = loss
        self.tokens_per_chunk = tokens_per_chunk
        self.keep = keep
        self.keep_gib = keep_gib
        self.strategy = strategy
        self.keep_plan: KeepPlan | None = None
        """What the first step measured and decided. A run that is resumed sets it again (see
        `KeepPlan.to_dict`), so that it goes on with the same numbers."""
        self.collectives = Collectives()
        self.objective = ContrastiveObjective(loss, self.collectives)

    def __call__(
        self, queries: TextList, documents: TextList, negatives: TextList | None = None
    ) -> Tensor:
        """Add the gradient to `.grad` and return the loss of the global batch.

        Args:
            queries: This rank's b queries: texts, token lists, or packed tokens.
            documents: b documents, the positives in the queries' order.
            negatives: Any number of further documents; negatives for every query of all ranks.

        Raises:
            UserError: There are not as many documents as queries.
        """
        return self.report(queries, documents, negatives).loss

    def report(
        self,
        queries: TextList,
        documents: TextList,
        negatives: TextList | None = None,
        *,
        symmetric: bool | None = None,
        ids: Sequence[str] | None = None,
    ) -> StepReport:
        """Do the same and return the loss with what else was found out on the way.

        `symmetric` overrides the loss's for this batch; all ranks must pass the same. `ids` are the
        queries' records', for a loss that leaves out false negatives; all ranks give them or none.
        """
        sides = [
            self._tokens(queries, "query"),
            self._tokens(documents, "document"),
            self._tokens([] if negatives is None else negatives, "document"),
        ]
        sizes = [side.num_texts for side in sides]
        if sizes[0] != sizes[1]:
            raise UserError(f"{sizes[0]} queries need as many documents, got {sizes[1]}")
        texts = Texts.concatenate(sides)
        distinct = distinct_texts(texts, sizes[0])
        chunks, rows = self._chunks(distinct.texts)

        # 1. Embed.
        embeddings_ud = torch.empty(
            distinct.texts.num_texts,
            self.encoder.embedding_width,
            dtype=self.encoder.dtype,
            device=self.encoder.device,
        )
        with phase("embed"):
            passes = self._embed(chunks, rows, embeddings_ud)

        # 2. Loss, and its gradient with respect to the embeddings.
        leaf_ud = embeddings_ud.requires_grad_()
        embeddings_nd = leaf_ud
        if distinct.texts.num_texts < texts.num_texts:
            embeddings_nd = leaf_ud[torch.from_numpy(distinct.places).to(self.encoder.device)]
        value: ObjectiveValue = self.objective(
            *embeddings_nd.split(sizes),
            symmetric=symmetric,
            hashes=hash_pairs(sides[0], sides[1], sides[2], ids)
            if self.loss.mask_duplicates
            else None,
        )
        with self._gradient_pass() as backward:
            with phase("loss"):
                value.rank_loss.backward()
            assert leaf_ud.grad is not None
            # 3. Push it into the weights.
            with phase("replay"):
                _push(passes, leaf_ud.grad, self._forward, backward)
            # 4. Leaving the context averages the gradients over ranks.

        own = [one for one in passes if len(one.rows_n)]
        return StepReport(
            loss=value.loss,
            accuracy=value.accuracy,
            embeddings_finite=embeddings_ud.detach().isfinite().all(),
            num_tokens=int(texts.lengths.sum()),
            num_encoded_tokens=int(distinct.texts.lengths.sum()),
            num_padded_tokens=sum(one.chunk.input_ids.numel() for one in own),
            num_chunks=len(own),
            units=self._units(passes),
        )

    @property
    def _forward(self) -> Callable[[Chunk], Tensor]:
        return self.encoder if self.strategy is None else self.strategy.encoder

    @property
    def _needs_equal_chunks(self) -> bool:
        return self.strategy is not None and self.strategy.equal_chunks

    def _gradient_pass(self) -> AbstractContextManager[Backward]:
        if self.strategy is not None:
            return self.strategy.gradient_pass()
        return _averaged([*self.encoder.parameters(), *self.loss.parameters()], self.collectives)

    def _chunks(self, texts: Texts) -> tuple[list[Chunk], list[Tensor]]:
        """Return the chunks and the rows of each, on the device.

        Where all ranks need as many, those that have fewer get chunks of one token and no rows.
        """
        device = self.encoder.device
        plan, chunks = self.encoder.make_chunks(texts, self.tokens_per_chunk)
        rows = [torch.from_numpy(rows_n).to(device) for rows_n in plan]
        if self._needs_equal_chunks:
            most = int(self.collectives.max(torch.tensor([len(chunks)], device=device)))
            for _ in range(most - len(chunks)):
                chunks.append(self._filler())
                rows.append(torch.empty(0, dtype=torch.int64, device=device))
        return chunks, rows

    def _embed(
        self, chunks: Sequence[Chunk], rows: Sequence[Tensor], embeddings_ud: Tensor
    ) -> list[_Pass]:
        """Fill in the embeddings and return what is known of each chunk.

        Where `auto` took more memory than there is, it tries again with half of it.
        """
        before = RandomState.of(self.encoder.device)
        while True:
            levels = self._levels(chunks)
            try:
                return self._embed_at(levels, chunks, rows, embeddings_ud)
            except torch.OutOfMemoryError:
                # Ranks that must do the same can't know of it in the midst of their passes.
                if self.keep != "auto" or set(levels) <= {"none"} or self._needs_equal_chunks:
                    raise
            # Here, outside of the handler, nothing holds the graphs any more.
            assert self.keep_plan is not None
            assert self.keep_plan.budget_bytes is not None
            self.keep_plan = self.keep_plan._replace(budget_bytes=self.keep_plan.budget_bytes // 2)
            before.restore()

    def _embed_at(
        self,
        levels: Sequence[str],
        chunks: Sequence[Chunk],
        rows: Sequence[Tensor],
        embeddings_ud: Tensor,
    ) -> list[_Pass]:
        passes = []
        for chunk, rows_n, level in zip(chunks, rows, levels, strict=True):
            state = RandomState.of(self.encoder.device)
            chunk_embeddings_nd = embed_keeping(self._forward, chunk, level)
            embeddings_ud[rows_n] = chunk_embeddings_nd.detach()[: len(rows_n)]
            passes.append(_Pass(chunk, rows_n, level, state, chunk_embeddings_nd))
        return passes

    def _filler(self) -> Chunk:
        one_token = Texts.from_lists([[self.encoder.pad_id]])
        return self.encoder.make_chunks(one_token, 1)[1][0]

    def _levels(self, chunks: Sequence[Chunk]) -> list[str]:
        """Return what each chunk keeps; the first step measures what that costs."""
        if self.keep in ("none", "all") and self.keep_gib is None:
            return [self.keep] * len(chunks)
        if self.keep_plan is None:
            self.keep_plan = self._measure(chunks)
        tokens = [chunk.input_ids.numel() for chunk in chunks]
        if self._needs_equal_chunks:
            # Ranks differ in their chunks' tokens, but must keep the same ones.
            tokens = [self.tokens_per_chunk] * len(chunks)
        return self.keep_plan.levels(self.keep, tokens)

    def _measure(self, chunks: Sequence[Chunk]) -> KeepPlan:
        chunk = chunks[0] if chunks else self._filler()
        with RandomState.of(self.encoder.device).replayed():
            costs = measure_levels(self._forward, chunk, list(self.encoder.parameters()))
        budget = None if self.keep_gib is None else int(self.keep_gib * GIB)
        if budget is None and self.keep == "auto":
            budget = measured_budget(self.encoder, costs, self.tokens_per_chunk)
        return KeepPlan(costs, budget).agreed(self.collectives, self.encoder.device)

    def _units(self, passes: Sequence[_Pass]) -> float:
        levels = [one.level for one in passes]
        if self.keep_plan is None:  # All at none, or all at all.
            return 4.0 if "none" in levels else 3.0
        return self.keep_plan.units(levels, [one.chunk.input_ids.numel() for one in passes])

    def _tokens(self, texts: TextList, side: str) -> Texts:
        if isinstance(texts, Texts):
            return texts
        if isinstance(texts, str):
            raise UserError(f"{side}: expected a list of texts, got one string")
        if len(texts) > 0 and isinstance(texts[0], str):
            return self.encoder.tokenize(texts, side=side)[0]  # type: ignore[arg-type]
        return Texts.from_lists(texts)  # type: ignore[arg-type]


def _push(
    passes: Sequence[_Pass],
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


def _gradient_of(one: _Pass, gradients_ud: Tensor) -> Tensor:
    if len(one.rows_n) == 0:
        return torch.zeros_like(one.embeddings_nd)
    return gradients_ud[one.rows_n]


@contextmanager
def _averaged(parameters: Sequence[torch.nn.Parameter], collectives: Collectives) -> Any:
    with one_reduction(parameters, collectives):
        yield backward_locally
