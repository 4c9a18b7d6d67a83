"""Gradient caching: the gradient of a global batch in the memory of one chunk (arXiv 2101.06983).

0. Even out the ranks' parts (see balance.py).
1. Embed every chunk, keeping for the backward pass what memory allows (see keep.py), and
   noting the random state before each chunk that keeps nothing.
2. Gather the embeddings of all ranks; loss; its gradient with respect to this rank's embeddings.
3. Push the embeddings' gradient into the weights: all chunks that kept something in one backward
   pass, then each other after restoring its random state and embedding it again.
4. Average the gradients over ranks, once.

The chain rule makes this equal to one backward pass over the whole global batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from largebatch.batch import Texts
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.losses.masks import PairHashes
from largebatch.model.encoder import Encoder
from largebatch.objectives.contrastive import ContrastiveObjective, hash_pairs
from largebatch.out_of_memory import ends_with
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import backward as backward_locally
from largebatch.parallel.ddp import one_reduction
from largebatch.parallel.strategy import Backward, Strategy
from largebatch.phases import phase
from largebatch.step.balance import Part, even_out
from largebatch.step.chunk_size import choose_tokens_per_chunk
from largebatch.step.distinct import DistinctTexts, distinct_texts
from largebatch.step.dropout import RandomState, masks_of_rank, state_hash
from largebatch.step.hashes import id_hashes
from largebatch.step.memory import StepMemory
from largebatch.step.passes import Passes, Sending, StepMustBeDoneAgain
from largebatch.transfer import to_device

TextList = Sequence[str] | Sequence[Sequence[int]] | Texts
"""Texts, token lists, or packed tokens."""


class StepReport(NamedTuple):
    """What a call of GradCache found out on the way."""

    loss: Tensor
    """Scalar, the mean over the global batch, the same on all ranks, without a graph."""
    accuracy: Tensor
    """Scalar, the share of queries whose own document scores highest among all columns."""
    masked_share: Tensor
    """Scalar, the share of all queries' negatives that is left out as false ones (masks.py)."""
    without_negatives: Tensor
    """Scalar, the share of queries that have no negative: nothing is learned from them."""
    embeddings_finite: Tensor
    """Bool scalar, whether all of this rank's embeddings are finite."""
    num_tokens: int
    """Tokens of this rank's texts, of those that it embeds."""
    num_encoded_tokens: int
    """Those that went through the encoder: of identical texts only the first's."""
    num_padded_tokens: int
    """The same, padding included."""
    num_chunks: int
    """Chunks of this rank."""
    units: float
    """Work of the step's encoder passes: a forward pass is 1, a backward pass 2. So 4 with nothing
    kept, 3 with everything."""


class GradCache:
    """Puts the gradient of a global batch into `.grad` of an encoder and of a loss's temperature.

    Args:
        encoder: Embeds one chunk.
        loss: Contrasts the embeddings.
        tokens_per_chunk: Most tokens, padding included, that go through the encoder at once: what
            memory is spent on. The result doesn't depend on it, but for rounding. None: the fastest
            of a few sizes, tried in the first step. Halved where memory runs out.
        keep: What the first pass keeps for the backward pass. "none" embeds each chunk a second
            time, in the memory of one chunk. "layers" keeps a little of each layer and saves a
            third of that work, "products" keeps what is expensive to compute and saves all but a
            little of it, "all" keeps every chunk's graph, in the memory of a full batch. "auto"
            chooses, by the memory that is free, among those that are faster for it.
        keep_gib: Memory that may be held for the backward pass; chunks that don't fit keep less, or
            nothing. None: as much as it takes; for "auto" on a GPU: what is free.
        strategy: How the model is spread over ranks. None: every rank holds all of it, and one
            all-reduce averages the gradients.
        balance: Whether ranks exchange pairs, so that none embeds more tokens than the others. The
            result doesn't depend on it, but for rounding.

    Under torchrun each rank passes its own part of the global batch; parts may differ in size and
    may be empty on some ranks. All ranks must call it.

    Ranks draw different dropout masks, also if all have called `torch.manual_seed(0)`: where the
    generator of `encoder.device` stands on a rank as it does on another, the step draws from a
    state that follows from it and the rank. After the step that generator has moved on by one
    number (by none without dropout), and stands alike on those ranks again. Ranks that were seeded
    apart draw from their generators as they are.

    Raises:
        UserError: An option is not what it must be; when called: "auto" without a GPU and
            without `keep_gib`, or the step is too much for the memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ContrastiveLoss,
        *,
        tokens_per_chunk: int | None = 16384,
        keep: str = "none",
        keep_gib: float | None = None,
        strategy: Strategy | None = None,
        balance: bool = True,
    ) -> None:
        self.encoder = encoder
        self.loss = loss
        self.memory = StepMemory(tokens_per_chunk, keep, keep_gib)
        """How much a step takes: what was chosen, measured or halved. A run that is resumed sets it
        again, so that it goes on with the same numbers."""
        self.strategy = strategy
        self.balance = balance
        self.collectives = Collectives()
        self.objective = ContrastiveObjective(loss, self.collectives)
        self.passes = Passes(encoder, self.memory, self.collectives, strategy)

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

        `symmetric` overrides the loss's for this batch; all ranks must pass the same. `ids`, one a
        query, are for a loss that leaves out false negatives: queries with the same id have all
        their documents in common. All ranks give them or none.
        """
        part = Part(
            self._tokens(queries, "query"),
            self._tokens(documents, "document"),
            self._tokens([] if negatives is None else negatives, "document"),
            None if ids is None or not self.loss.mask_duplicates else id_hashes(ids),
        )
        if part.queries.num_texts != part.documents.num_texts:
            raise UserError(
                f"{part.queries.num_texts} queries need as many documents, got "
                f"{part.documents.num_texts}"
            )
        with ends_with(self.memory.ran_out):
            return self._report(part, symmetric)

    def _report(self, part: Part, symmetric: bool | None) -> StepReport:
        if self.balance:
            with phase("gather"):
                part = even_out(part, self.collectives)
        hashes = hash_pairs(*part) if self.loss.mask_duplicates else None
        sides = part[:3]
        sizes = [side.num_texts for side in sides]
        texts = Texts.concatenate(sides)
        if self.memory.tokens_per_chunk is None:
            self.choose_tokens_per_chunk(texts)
        distinct = distinct_texts(texts, sizes[0])
        before = RandomState.of(self.encoder.device)
        parameters = [*self.encoder.parameters(), *self.loss.parameters()]
        can_redo = self.passes.can_redo and all(p.grad is None for p in parameters)
        while True:
            try:
                return self._step(sizes, texts, distinct, hashes, symmetric, can_redo=can_redo)
            except StepMustBeDoneAgain:
                pass
            # Out here nothing holds the graphs any more.
            for parameter in parameters:
                parameter.grad = None
            before.restore()

    @property
    def tokens_per_chunk(self) -> int | None:
        """Most tokens of a chunk, as they are now: None before they are chosen, halved since."""
        return self.memory.tokens_per_chunk

    def choose_tokens_per_chunk(self, texts: Texts) -> int:
        """Set the tokens per chunk to the fastest for such texts, and return them.

        All ranks must call it.
        """
        chosen = choose_tokens_per_chunk(self.encoder, texts, strategy=self.strategy)
        self.memory.tokens_per_chunk = chosen
        return chosen

    def _step(
        self,
        sizes: list[int],
        texts: Texts,
        distinct: DistinctTexts,
        hashes: PairHashes | None,
        symmetric: bool | None,
        *,
        can_redo: bool,
    ) -> StepReport:
        b, _, n = sizes
        device = self.encoder.device
        num_distinct = distinct.texts.num_texts
        # 1. Embed; while chunks without columns are embedded, the columns are sent already.
        columns = distinct.places[b:]
        chunks = self.passes.plan(distinct.texts, columns)
        with phase("gather"):
            rows = self.objective.tell(
                b, n, hashes, num_chunks=len(chunks), random_state=state_hash(device)
            )
        embeddings_ud = torch.empty(
            num_distinct, self.encoder.embedding_width, dtype=self.encoder.dtype, device=device
        )
        sending = Sending(self.collectives, rows.columns, embeddings_ud, columns)
        with masks_of_rank(rows.random_states, self.collectives.world.rank, device):
            embedded = self.passes.embed(
                distinct.texts, chunks, rows.most_chunks, embeddings_ud, sending
            )

        # 2. Loss, and its gradient with respect to the embeddings.
        leaf_ud = embeddings_ud.requires_grad_()
        embeddings_nd = leaf_ud
        if num_distinct < texts.num_texts:
            embeddings_nd = leaf_ud[to_device(distinct.places, device)]
        value = self.objective(
            *embeddings_nd.split(sizes),
            rows=rows,
            columns=sending.started,
            symmetric=symmetric,
        )
        with self._gradient_pass() as backward:
            with phase("loss"):
                value.rank_loss.backward()
            assert leaf_ud.grad is not None
            # 3. Push it into the weights.
            self.passes.push(embedded, leaf_ud.grad, backward, can_redo=can_redo)
            # 4. Leaving the context averages the gradients over ranks.

        assert embedded is not None  # else memory ran out, and push has said so on all ranks
        own = [one for one in embedded if len(one.rows_n)]
        return StepReport(
            loss=value.loss,
            accuracy=value.accuracy,
            masked_share=value.masked_share,
            without_negatives=value.without_negatives,
            embeddings_finite=embeddings_ud.detach().isfinite().all(),
            num_tokens=int(texts.lengths.sum()),
            num_encoded_tokens=int(distinct.texts.lengths.sum()),
            num_padded_tokens=sum(one.chunk.num_tokens for one in own),
            num_chunks=len(own),
            units=self.memory.units([(one.level, one.chunk.num_tokens) for one in embedded])
            + self.encoder.extra_units,
        )

    def _gradient_pass(self) -> AbstractContextManager[Backward]:
        if self.strategy is not None:
            return self.strategy.gradient_pass()
        return _averaged([*self.encoder.parameters(), *self.loss.parameters()], self.collectives)

    def _tokens(self, texts: TextList, side: str) -> Texts:
        if isinstance(texts, Texts):
            return texts
        if isinstance(texts, str):
            raise UserError(f"{side}: expected a list of texts, got one string")
        if len(texts) > 0 and isinstance(texts[0], str):
            return self.encoder.tokenize(texts, side=side)[0]  # type: ignore[arg-type]
        return Texts.from_lists(texts)  # type: ignore[arg-type]


@contextmanager
def _averaged(parameters: Sequence[torch.nn.Parameter], collectives: Collectives) -> Any:
    with one_reduction(parameters, collectives):
        yield backward_locally
