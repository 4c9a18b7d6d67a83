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

Shapes: b pairs and n negatives of this rank, u distinct texts among them, m rows of all ranks that
the objective gathers, d embedding width.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array, RankBatch, Texts
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import ends_with
from largebatch.parallel.collectives import Collectives, Gathering
from largebatch.parallel.ddp import Replicas
from largebatch.parallel.strategy import Spread
from largebatch.phases import phase
from largebatch.step.balance import Pairs, balanced_pairs
from largebatch.step.chunk_size import choose_tokens_per_chunk
from largebatch.step.distinct import DistinctTexts, distinct_texts
from largebatch.step.dropout import masks_of_rank, state_hash
from largebatch.step.memory import StepMemory
from largebatch.step.objective import (
    EmbeddedBatch,
    EmbeddingObjective,
    Facts,
    StepReport,
    Work,
)
from largebatch.step.passes import EarlyGather, EmbeddedChunk, Passes, do_until_done
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
        objective.meet(encoder)
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
        pairs = balanced_pairs(batch, self.collectives, balance=self.balance)
        if self.memory.tokens_per_chunk is None:
            self.choose_tokens_per_chunk(batch)
        prepared = self._prepare(pairs, batch)
        return do_until_done(
            partial(self._step, prepared),
            (self.encoder, self.objective),
            device=self.encoder.device,
            can_redo=self.strategy.can_redo,
        )

    def _prepare(self, pairs: Pairs, batch: RankBatch) -> "_Prepared":
        sides = {"query": pairs.queries, "document": pairs.documents, "negative": pairs.negatives}
        sizes = {name: side.num_texts for name, side in sides.items()}
        texts = Texts.concatenate(list(sides.values()))
        distinct = distinct_texts(texts, sizes["query"])
        of_sides = np.split(distinct.numbers, np.cumsum(list(sizes.values()))[:-1])
        gathered = self.objective.gathered_sides(batch.loss_options)
        columns = [index for side, index in zip(sides, of_sides, strict=True) if side in gathered]
        return _Prepared(
            pairs,
            batch.loss_options,
            texts,
            distinct,
            sizes,
            [side for side in sizes if side in gathered],
            np.concatenate(columns) if columns else np.empty(0, np.intp),
            batch.step,
        )

    def _step(self, prepared: "_Prepared", *, can_redo: bool) -> StepReport:
        device, rank = self.encoder.device, self.collectives.world.rank
        texts = prepared.distinct.texts
        # 1. Embed. While chunks without columns are embedded, the columns are gathered already.
        chunks = self.passes.plan(texts, prepared.columns)
        with phase("gather"):
            ranks = self._exchange_facts(prepared.pairs, len(chunks), state_hash(device))
        counts = [one.count(prepared.gathered) for one in ranks.facts]
        embeddings_ud = torch.empty(
            texts.num_texts, self.encoder.embedding_width, dtype=self.encoder.dtype, device=device
        )
        gather = EarlyGather(self.collectives, counts, embeddings_ud, prepared.columns)
        with masks_of_rank(ranks.random_states, rank, device):
            embedded = self.passes.embed(texts, chunks, ranks.num_chunks, embeddings_ud, gather)

        # 2. Loss, and its gradient with respect to the embeddings.
        embeddings_ud.requires_grad_()
        batch = self._embedded_batch(prepared, embeddings_ud, ranks, counts, gather.started)
        with phase("loss"):
            value = self.objective.compute(batch)
        with self.strategy.gradient_pass() as backward:
            with phase("loss"):
                value.own_share.backward()
            assert embeddings_ud.grad is not None, "the loss must depend on all embeddings"
            # 3. Push it into the weights.
            self.passes.push(embedded, embeddings_ud.grad, backward, can_redo=can_redo)
            # 4. Leaving the context averages the gradients over ranks.

        assert embedded is not None  # else memory ran out, and push has said so on all ranks
        return StepReport(
            value.loss,
            value.metrics,
            embeddings_ud.detach().isfinite().all(),
            self._work(prepared, embedded),
        )

    def _embedded_batch(
        self,
        prepared: "_Prepared",
        embeddings_ud: Tensor,
        ranks: "_FactsOfRanks",
        counts: list[int],
        started: Gathering | None,
    ) -> EmbeddedBatch:
        """Return what the objective sees, with the gathered sides of all ranks."""
        embeddings = embeddings_ud
        if len(embeddings_ud) < prepared.texts.num_texts:
            embeddings = embeddings_ud[to_device(prepared.distinct.numbers, embeddings_ud.device)]
        parts = embeddings.split(list(prepared.sizes.values()))
        sides = dict(zip(prepared.sizes, parts, strict=True))
        gathered_md = None
        if prepared.gathered:
            own = [sides[side] for side in prepared.gathered if len(sides[side])]
            # Not copied where it is one side: it may be the largest tensor of the step.
            own_md = torch.cat(own) if len(own) > 1 else own[0] if own else embeddings[:0]
            with phase("gather"):
                gathered_md = self.collectives.gather_rows(own_md, counts, started=started).rows
        return EmbeddedBatch(
            sides["query"],
            sides["document"],
            sides["negative"],
            prepared.pairs.negative_counts,
            gathered_md,
            sum(counts[: self.collectives.world.rank]),
            ranks.facts,
            prepared.pairs,
            prepared.options,
            self.collectives,
            prepared.step,
        )

    def _work(self, prepared: "_Prepared", embedded: Sequence[EmbeddedChunk]) -> Work:
        own = [one for one in embedded if len(one.rows_n)]  # without those that only fill up
        total = sum(one.chunk.num_tokens for one in embedded)
        kept = sum(one.kept_tokens for one in embedded)
        return Work(
            num_tokens=int(prepared.texts.lengths.sum()),
            num_encoded_tokens=int(prepared.distinct.texts.lengths.sum()),
            num_padded_tokens=sum(one.chunk.num_tokens for one in own),
            num_chunks=len(own),
            forwards=4.0 - kept / max(total, 1) + self.encoder.extra_forwards,
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
    options: LossOptions
    """What the batch's source asks for."""
    texts: Texts
    """Of all sides, queries first."""
    distinct: DistinctTexts
    sizes: dict[str, int]
    """Texts of each side: query, document, negative."""
    gathered: list[str]
    """The sides that go to the other ranks."""
    columns: Int64Array
    """`[k]`, which of the distinct texts these are, side after side."""
    step: int
    """Number of the optimizer step, from 0."""


class _FactsOfRanks(NamedTuple):
    """What ranks have told each other before they embed."""

    facts: list[Facts]
    num_chunks: int
    """The most that any rank has."""
    random_states: list[int]
    """A hash of each rank's generator."""
