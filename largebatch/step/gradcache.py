"""Gradient caching: the gradient of a global batch in the memory of one chunk (arXiv 2101.06983).

0. Balance: ranks exchange pairs, so that they have equally many tokens (balance.py).
1. Embed every chunk: with its graph where memory allows (memory.py), else without, noting the
   random state before it (passes.py).
2. Gather embeddings of all ranks; the objective's loss; its gradient with respect to this rank's
   embeddings (objective.py).
3. Push that gradient into the weights: all chunks that kept their graph in one backward pass, then
   each other after restoring its random state and embedding it again.
4. Average the gradients over ranks, once.

The chain rule makes this equal to one backward pass over the whole global batch.

What ranks tell each other, once per step however many chunks there are:

1. how many rows each has, with what the objective must know of them and a hash of its generator: an
   all-gather of integers (a second one where a rank has more of them than any had before), from
   host to host;
2. the embeddings of the sides that the objective gathers: an all-gather, and a reduce-scatter of
   their gradient;
3. what the objective itself combines, such as the loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array, RankBatch, Texts
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import ends_with
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import Replicas
from largebatch.parallel.strategy import Spread
from largebatch.phases import phase
from largebatch.step.balance import Pairs, exchange_pairs
from largebatch.step.chunk_size import choose_tokens_per_chunk
from largebatch.step.distinct import DistinctTexts, distinct_texts
from largebatch.step.dropout import RandomState, masks_of_rank, state_hash
from largebatch.step.memory import StepMemory
from largebatch.step.objective import (
    EmbeddedBatch,
    EmbeddingObjective,
    Facts,
    StepReport,
    Work,
)
from largebatch.step.passes import EarlyGather, Passes, StepMustBeDoneAgain
from largebatch.transfer import to_device

TextList = Sequence[str] | Sequence[Sequence[int]] | Texts
"""Texts, token lists, or packed tokens."""


class GradCache:
    """Puts the gradient of a global batch into `.grad` of an encoder and of an objective.

    Args:
        encoder: Embeds one chunk.
        objective: What is optimized, such as a `ContrastiveLoss`.
        tokens_per_chunk: Most tokens, padding included, that go through the encoder at once: what
            memory is spent on. The result doesn't depend on it, but for rounding. None: the fastest
            of a few sizes, tried in the first step. Halved where memory runs out.
        keep: Which chunks keep their graph from the first pass to the backward pass. "none" embeds
            each chunk a second time, in the memory of one chunk. "all" saves that work, in the
            memory of a full batch. "auto" keeps as many graphs as fit into `keep_gib`.
        keep_gib: Memory that graphs may hold; chunks beyond it keep nothing. None: as much as it
            takes; for "auto" on a GPU: what is free.
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
        objective: EmbeddingObjective,
        *,
        tokens_per_chunk: int | None = 16384,
        keep: str = "none",
        keep_gib: float | None = None,
        strategy: Spread | None = None,
        balance: bool = True,
    ) -> None:
        self.encoder = encoder
        self.objective = objective
        self.memory = StepMemory(tokens_per_chunk, keep, keep_gib)
        """How much a step takes: what was chosen, measured or halved. A run that is resumed sets it
        again, so that it goes on with the same numbers."""
        if strategy is None:
            strategy = Replicas([encoder, objective], Collectives())
        self.strategy = strategy
        self.balance = balance
        self.collectives = strategy.collectives
        self.passes = Passes(encoder, self.memory, strategy)

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
        batch = RankBatch(
            self._tokens(queries, "query"),
            self._tokens(documents, "document"),
            self._tokens([] if negatives is None else negatives, "document"),
        )
        return self.accumulate(batch).loss

    def accumulate(self, batch: RankBatch) -> StepReport:
        """Add the gradient to `.grad` and return the loss with what was found out on the way.

        Raises:
            UserError: There are not as many documents as queries, or no rank has any; or the step
                is too much for the memory.
        """
        if batch.queries.num_texts != batch.documents.num_texts:
            raise UserError(
                f"{batch.queries.num_texts} queries need as many documents, got "
                f"{batch.documents.num_texts}"
            )
        with ends_with(self.memory.ran_out):
            return self._accumulate(batch)

    def choose_tokens_per_chunk(self, batch: RankBatch) -> int:
        """Set the tokens per chunk to the fastest for such a batch, and return them.

        All ranks must call it.
        """
        texts = Texts.concatenate([batch.queries, batch.documents, batch.negatives])
        chosen = choose_tokens_per_chunk(self.encoder, texts, strategy=self.strategy)
        self.memory.tokens_per_chunk = chosen
        return chosen

    def _accumulate(self, batch: RankBatch) -> StepReport:
        # 0. Balance.
        pairs = Pairs.of(batch)
        if self.balance:
            with phase("gather"):
                pairs = exchange_pairs(pairs, self.collectives)
        if self.memory.tokens_per_chunk is None:
            self.choose_tokens_per_chunk(batch)
        prepared = self._prepare(pairs, batch)
        before = RandomState.of(self.encoder.device)
        parameters = [*self.encoder.parameters(), *self.objective.parameters()]
        can_redo = self.strategy.can_redo and all(p.grad is None for p in parameters)
        while True:
            try:
                return self._step(prepared, can_redo=can_redo)
            except StepMustBeDoneAgain:
                pass
            # Out here nothing holds the graphs any more.
            for parameter in parameters:
                parameter.grad = None
            before.restore()

    def _prepare(self, pairs: Pairs, batch: RankBatch) -> "_Prepared":
        sides = {"query": pairs.queries, "document": pairs.documents, "negative": pairs.negatives}
        sizes = {name: side.num_texts for name, side in sides.items()}
        texts = Texts.concatenate(list(sides.values()))
        distinct = distinct_texts(texts, sizes["query"])
        places = dict(
            zip(sides, np.split(distinct.places, np.cumsum(list(sizes.values()))[:-1]), strict=True)
        )
        gathered = self.objective.gathered_sides(batch.loss_options)
        columns = [places[side] for side in gathered]
        return _Prepared(
            pairs,
            batch,
            texts,
            distinct,
            np.concatenate(columns) if columns else np.empty(0, np.intp),
        )

    def _step(self, prepared: "_Prepared", *, can_redo: bool) -> StepReport:
        pairs, batch, texts, distinct, columns = prepared
        device = self.encoder.device
        num_distinct = distinct.texts.num_texts
        gathered = self.objective.gathered_sides(batch.loss_options)
        # 1. Embed; while chunks without columns are embedded, the columns are gathered already.
        chunks = self.passes.plan(distinct.texts, columns)
        with phase("gather"):
            told = self._exchange_facts(pairs, len(chunks), state_hash(device))
        counts = [
            sum({"query": b, "document": b, "negative": n}[side] for side in gathered)
            for b, n, _ in told.facts
        ]
        embeddings_ud = torch.empty(
            num_distinct, self.encoder.embedding_width, dtype=self.encoder.dtype, device=device
        )
        gather = EarlyGather(self.collectives, counts, embeddings_ud, columns)
        with masks_of_rank(told.random_states, self.collectives.world.rank, device):
            embedded = self.passes.embed(
                distinct.texts, chunks, told.num_chunks, embeddings_ud, gather
            )

        # 2. Loss, and its gradient with respect to the embeddings.
        leaf_ud = embeddings_ud.requires_grad_()
        embeddings_nd = leaf_ud
        if num_distinct < texts.num_texts:
            embeddings_nd = leaf_ud[to_device(distinct.places, device)]
        b, n = pairs.queries.num_texts, pairs.negatives.num_texts
        sides = dict(
            zip(("query", "document", "negative"), embeddings_nd.split([b, b, n]), strict=True)
        )
        gathered_md = None
        if gathered:
            with phase("gather"):
                own = [sides[side] for side in gathered if len(sides[side])]
                own_md = torch.cat(own) if len(own) > 1 else own[0] if own else embeddings_nd[:0]
                gathered_md = self.collectives.gather_rows(
                    own_md, counts, started=gather.started
                ).rows
        with phase("loss"):
            value = self.objective.compute(
                EmbeddedBatch(
                    sides["query"],
                    sides["document"],
                    sides["negative"],
                    pairs.negative_counts,
                    gathered_md,
                    sum(counts[: self.collectives.world.rank]),
                    told.facts,
                    batch.loss_options,
                    self.collectives,
                )
            )
        with self.strategy.gradient_pass() as backward:
            with phase("loss"):
                value.own_share.backward()
            assert leaf_ud.grad is not None
            # 3. Push it into the weights.
            self.passes.push(embedded, leaf_ud.grad, backward, can_redo=can_redo)
            # 4. Leaving the context averages the gradients over ranks.

        assert embedded is not None  # else memory ran out, and push has said so on all ranks
        own_chunks = [one for one in embedded if len(one.rows_n)]
        total = max(sum(one.chunk.num_tokens for one in embedded), 1)
        kept = sum(one.kept_tokens for one in embedded)
        return StepReport(
            value.loss,
            value.metrics,
            embeddings_ud.detach().isfinite().all(),
            Work(
                num_tokens=int(texts.lengths.sum()),
                num_encoded_tokens=int(distinct.texts.lengths.sum()),
                num_padded_tokens=sum(one.chunk.num_tokens for one in own_chunks),
                num_chunks=len(own_chunks),
                forwards=4.0 - kept / total + self.encoder.extra_forwards,
            ),
        )

    def _exchange_facts(self, pairs: Pairs, num_chunks: int, random_state: int) -> "_FactsOfRanks":
        """Tell all ranks what this one has, and return what they have; all ranks must call it.

        Raises:
            UserError: No rank has a pair.
        """
        known = self.objective.knowledge(pairs)
        header = [pairs.queries.num_texts, pairs.negatives.num_texts, num_chunks, random_state]
        sizes = [len(numbers) for numbers in known.values()]
        message = np.concatenate([np.array([*header, *sizes], np.int64), *known.values()])
        facts, chunks, states = [], [], []
        for told in self.collectives.gather_ragged(message):
            b, n, number, state, *lengths = told[: len(header) + len(known)].tolist()
            length = len(header) + len(known) + sum(lengths)
            assert len(told) == length, "ranks know different things"
            parts = np.split(told[len(header) + len(known) :], np.cumsum(lengths))
            facts.append(Facts(b, n, dict(zip(known, parts[:-1], strict=True))))
            chunks.append(number)
            states.append(state)
        if sum(one.num_pairs for one in facts) == 0:
            raise UserError("the global batch has no pairs; all of its records were skipped")
        return _FactsOfRanks(facts, max(chunks), states)

    def _tokens(self, texts: TextList, side: str) -> Texts:
        if isinstance(texts, Texts):
            return texts
        if isinstance(texts, str):
            raise UserError(f"{side}: expected a list of texts, got one string")
        if len(texts) > 0 and isinstance(texts[0], str):
            return self.encoder.tokenize(texts, side=side)[0]  # type: ignore[arg-type]
        return Texts.from_lists(texts)  # type: ignore[arg-type]


class _Prepared(NamedTuple):
    """What a step works on, however often it is done again."""

    pairs: Pairs
    batch: RankBatch
    texts: Texts
    """Of all sides."""
    distinct: DistinctTexts
    columns: Int64Array
    """Which of the distinct texts go to the other ranks, in the order of the sides."""


class _FactsOfRanks(NamedTuple):
    """What ranks have told each other before they embed."""

    facts: list[Facts]
    num_chunks: int
    """The most that any rank has."""
    random_states: list[int]
    """A hash of each rank's generator."""
