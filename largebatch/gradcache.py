"""Gradient caching: the gradient of a global batch in the memory of one chunk (arXiv 2101.06983).

1. Embed every chunk without a graph, noting the random state before each.
2. Gather the embeddings of all ranks; loss; its gradient with respect to this rank's embeddings.
3. For each chunk: restore its random state, embed it again with a graph, and push the embeddings'
   gradient through it into the weights.
4. Average the gradients over ranks, once.

The chain rule makes this equal to one backward pass over the whole global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from largebatch.batch import Chunk, Texts
from largebatch.data.chunks import pad_chunks, plan_chunks
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.model.encoder import Encoder
from largebatch.objective import ContrastiveObjective
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import one_reduction
from largebatch.parallel.strategy import Strategy

GradientPass = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a step's backward passes; leaving it averages the gradients over ranks."""


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
    num_padded_tokens: int
    """The same, padding included."""
    num_chunks: int
    """Chunks of this rank."""


class GradCache:
    """Puts the gradient of a global batch into `.grad` of an encoder and of a loss's temperature.

    Args:
        encoder: Embeds one chunk.
        loss: Contrasts the embeddings.
        tokens_per_chunk: Most padded tokens that go through the encoder at once: what memory is
            spent on. The result doesn't depend on it, but for rounding.
        keep: "none" embeds each chunk a second time for the backward pass, in the memory of one
            chunk. "all" keeps every chunk's graph: a quarter less work, the memory of a full batch.
        strategy: How the model is spread over ranks. None: every rank holds all of it, and one
            all-reduce averages the gradients.

    Under torchrun each rank passes its own part of the global batch; parts may differ in size and
    may be empty on some ranks. All ranks must call it.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ContrastiveLoss,
        *,
        tokens_per_chunk: int = 16384,
        keep: str = "none",
        strategy: Strategy | None = None,
        gradient_pass: GradientPass | None = None,
    ) -> None:
        if tokens_per_chunk < 1:
            raise UserError(f"tokens_per_chunk={tokens_per_chunk} must be at least 1")
        if keep not in ("none", "all"):
            raise UserError(f"keep={keep!r} is neither 'none' nor 'all'")
        self.encoder = encoder
        self.loss = loss
        self.tokens_per_chunk = tokens_per_chunk
        self.keep = keep
        collectives = Collectives()
        self.objective = ContrastiveObjective(loss, collectives)
        self.collectives = collectives
        self.forward: Callable[[Chunk], Tensor] = getattr(strategy, "encoder", encoder)
        self.equal_chunks: bool = getattr(strategy, "equal_chunks", False)
        self.gradient_pass: GradientPass = gradient_pass or (
            strategy.gradient_pass
            if strategy is not None
            else lambda: one_reduction([*encoder.parameters(), *loss.parameters()], collectives)
        )

    def __call__(
        self,
        queries: Sequence[str] | Sequence[Sequence[int]] | Texts,
        documents: Sequence[str] | Sequence[Sequence[int]] | Texts,
        negatives: Sequence[str] | Sequence[Sequence[int]] | Texts | None = None,
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
        queries: Sequence[str] | Sequence[Sequence[int]] | Texts,
        documents: Sequence[str] | Sequence[Sequence[int]] | Texts,
        negatives: Sequence[str] | Sequence[Sequence[int]] | Texts | None = None,
        *,
        symmetric: bool | None = None,
    ) -> StepReport:
        """Do the same and return the loss with what else was found out on the way.

        `symmetric` overrides the loss's for this batch; all ranks must pass the same.
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
        plan = plan_chunks(texts.lengths, self.tokens_per_chunk)
        num_chunks = len(plan)
        chunks = pad_chunks(texts, plan, pad_id=self.encoder.pad_id, device=self.encoder.device)
        rows = [torch.from_numpy(r).to(self.encoder.device) for r in plan]
        fillers = self._fillers(num_chunks)

        # 1. Embed.
        embeddings_nd = torch.empty(
            texts.num_texts,
            self.encoder.embedding_width,
            dtype=self.encoder.dtype,
            device=self.encoder.device,
        )
        states: list[RandomState] = []
        kept: list[Tensor] = []
        for chunk, rows_n in zip(chunks, rows, strict=True):
            states.append(RandomState.of(self.encoder.device))
            with torch.set_grad_enabled(self.keep == "all"):
                chunk_embeddings_nd = self.forward(chunk)
            embeddings_nd[rows_n] = chunk_embeddings_nd.detach()
            if self.keep == "all":
                kept.append(chunk_embeddings_nd)
        for filler in fillers:
            with torch.set_grad_enabled(self.keep == "all"):
                filler_embeddings_nd = self.forward(filler)
            if self.keep == "all":
                kept.append(filler_embeddings_nd)

        # 2. Loss, and its gradient with respect to the embeddings.
        leaf_nd = embeddings_nd.requires_grad_()
        value = self.objective(*leaf_nd.split(sizes), symmetric=symmetric)
        with self.gradient_pass() as backward:
            backward = backward or _backward
            value.rank_loss.backward()
            assert leaf_nd.grad is not None
            gradients = [leaf_nd.grad[rows_n] for rows_n in rows]

            # 3. Push it into the weights.
            nothing = leaf_nd.new_zeros(1, leaf_nd.shape[1])
            if self.keep == "all":
                backward(kept, [*gradients, *[nothing] * len(fillers)], last=True)
            else:
                passes = len(chunks) + len(fillers)
                for number, (chunk, state, gradient) in enumerate(
                    zip(chunks, states, gradients, strict=True), start=1
                ):
                    with state.replayed():
                        embeddings = self.forward(chunk)
                    backward([embeddings], [gradient], last=number == passes)
                for number, filler in enumerate(fillers, start=len(chunks) + 1):
                    backward([self.forward(filler)], [nothing], last=number == passes)
                if passes == 0:
                    backward([], [], last=True)
            # 4. Leaving the context averages the gradients over ranks.

        return StepReport(
            loss=value.loss,
            accuracy=value.accuracy,
            embeddings_finite=embeddings_nd.detach().isfinite().all(),
            num_tokens=int(texts.lengths.sum()),
            num_padded_tokens=sum(chunk.input_ids.numel() for chunk in chunks),
            num_chunks=len(chunks),
        )

    def _fillers(self, num_chunks: int) -> list[Chunk]:
        """Return one-token chunks for what this rank lacks to as many as the others have."""
        if not self.equal_chunks:
            return []
        count = torch.tensor([num_chunks], device=self.encoder.device)
        missing = int(self.collectives.max(count)) - num_chunks
        ids = torch.full((1, 1), self.encoder.pad_id, device=self.encoder.device)
        return [Chunk(ids, torch.ones_like(ids))] * missing

    def _tokens(self, texts: Sequence[str] | Sequence[Sequence[int]] | Texts, side: str) -> Texts:
        if isinstance(texts, Texts):
            return texts
        if isinstance(texts, str):
            raise UserError(f"{side}: expected a list of texts, got one string")
        if len(texts) > 0 and isinstance(texts[0], str):
            return self.encoder.tokenize(texts, side=side)[0]  # type: ignore[arg-type]
        return Texts.from_lists(texts)  # type: ignore[arg-type]


class RandomState(NamedTuple):
    """The state of the generators that dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """Read the state of the CPU's generator and of the device's."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what was drawn after this state was read, then go on as if nothing was."""
        devices = [] if self.cuda is None else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            yield


def _backward(embeddings: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:  # noqa: ARG001
    if embeddings:
        torch.autograd.backward(list(embeddings), list(gradients))
