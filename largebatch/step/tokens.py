"""The step of an objective that is a sum over tokens: nothing is gathered, no chunk is seen twice.

1. Balance: ranks exchange pairs, so that they have equally many tokens (balance.py).
2. Ranks tell each other how many tokens each predicts for each term of the loss, and how many
   chunks it has.
3. Each chunk goes forward and backward at once. A rank's sum is divided by (predicted tokens of all
   ranks / world size), the plain mean where ranks have equally many; each term by its own number.
4. Strategies average the gradients over ranks: that average is the gradient of the mean over the
   global batch.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import RankBatch, Texts
from largebatch.errors import UserError
from largebatch.model.chunks import IGNORED, TokenChunk
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import ends_with
from largebatch.parallel.strategy import Backward, Spread
from largebatch.phases import phase
from largebatch.step.balance import Pairs, balanced_pairs
from largebatch.step.chunk_size import choose_tokens_per_chunk
from largebatch.step.dropout import masks_of_rank, state_hash
from largebatch.step.memory import StepMemory
from largebatch.step.objective import StepReport, TokenObjective, TokenSums, TokenTask, Work
from largebatch.step.passes import StepMustBeDoneAgain, do_until_done


class TokenStep:
    """Puts the gradient of a global batch into `.grad` of an encoder and of a token objective.

    Args:
        encoder: Reads one chunk.
        objective: What is optimized.
        tokens_per_chunk: Most tokens, padding included, that go through the encoder at once. None:
            the fastest of a few sizes, tried in the first step.
        strategy: How encoder and objective are spread over ranks.
        balance: Whether ranks exchange pairs, so that none has more tokens than the others.
    """

    def __init__(
        self,
        encoder: Encoder,
        objective: TokenObjective,
        *,
        tokens_per_chunk: int | None,
        strategy: Spread,
        balance: bool = True,
    ) -> None:
        self.encoder = encoder
        self.objective = objective
        self.memory = StepMemory(tokens_per_chunk, "none", None)
        self.strategy = strategy
        self.balance = balance
        self.collectives = strategy.collectives

    def accumulate(self, batch: RankBatch) -> StepReport:
        """Add the gradient of the global batch to `.grad`; all ranks must call it.

        Raises:
            UserError: Nothing is to be predicted on any rank, or the memory is too small.
        """
        with ends_with(self.memory.ran_out):
            return self._accumulate(batch)

    def choose_tokens_per_chunk(self, batch: RankBatch) -> int:
        """Set the tokens per chunk to the fastest for such a batch, and return them."""
        texts = self.objective.make_task(Pairs.of(batch), self.encoder, step=batch.step).texts
        chosen = choose_tokens_per_chunk(self.encoder, texts, strategy=self.strategy)
        self.memory.tokens_per_chunk = chosen
        return chosen

    def _accumulate(self, batch: RankBatch) -> StepReport:
        pairs = balanced_pairs(batch, self.collectives, balance=self.balance)
        if self.memory.tokens_per_chunk is None:
            self.choose_tokens_per_chunk(batch)
        task = self.objective.make_task(pairs, self.encoder, step=batch.step)
        return do_until_done(
            partial(self._step, task),
            (self.encoder, self.objective),
            device=self.encoder.device,
            can_redo=self.strategy.can_redo,
        )

    def _step(self, task: TokenTask, *, can_redo: bool) -> StepReport:
        device, world = self.encoder.device, self.collectives.world
        chunks = self._chunks(task)
        num_own = len(chunks)
        with phase("gather"):
            own_predicted = [task.num_predicted[term] for term in self.objective.terms]
            message = np.array([num_own, state_hash(device), *own_predicted], np.int64)
            counts, states, *of_terms = zip(
                *(told.tolist() for told in self.collectives.gather_ragged(message)), strict=True
            )
        predicted = [sum(told) for told in of_terms]
        if not any(predicted):
            raise UserError(
                "nothing of the global batch is to be predicted: its texts are empty, or too few "
                "and short for the share of their tokens that is masked"
            )
        if self.strategy.equal_chunks:
            chunks += [self._filler(task)] * (max(counts) - num_own)
        # Of a term without anything to predict all sums are 0.
        shares_k = torch.tensor(
            [world.size / max(number, 1) for number in predicted],
            dtype=self.encoder.dtype,
            device=device,
        )
        sums: list[dict[str, TokenSums]] = []
        with self.strategy.gradient_pass() as backward:
            with masks_of_rank(states, world.rank, device):
                ran_out = not self._passes(chunks, shares_k, backward, sums)
            self._agree(chunks, ran_out=ran_out, can_redo=can_redo)
        loss, metrics = self._means(sums, predicted)
        own = chunks[:num_own]
        return StepReport(
            loss,
            metrics,
            torch.stack([term.loss for one in sums for term in one.values()]).isfinite().all()
            if sums
            else torch.ones((), dtype=torch.bool, device=device),
            Work(
                num_tokens=int(task.texts.lengths.sum()),
                num_encoded_tokens=int(task.texts.lengths.sum()),
                num_padded_tokens=sum(one.chunk.num_tokens for one in own),
                num_chunks=num_own,
                forwards=3.0 + self.encoder.extra_forwards,
            ),
        )

    def _passes(
        self,
        chunks: list[TokenChunk],
        shares_k: Tensor,
        backward: Backward,
        sums: list[dict[str, TokenSums]],
    ) -> bool:
        """Run all chunks forward and backward; return False if memory ran out."""
        try:
            for number, chunk in enumerate(chunks, start=1):
                with phase("embed"):
                    share, found = self.strategy.run(self._forward, chunk, shares_k)
                with phase("replay"):
                    backward([share], [torch.ones_like(share)], last=number == len(chunks))
                sums.append(found)
            if not chunks:
                backward([], [], last=True)
        except torch.OutOfMemoryError:
            if self.strategy.equal_chunks:
                raise UserError(self.memory.ran_out()) from None
            return False
        return True

    def _forward(self, chunk: TokenChunk, shares_k: Tensor) -> tuple[Tensor, dict[str, TokenSums]]:
        """Return what to back-propagate for a chunk, and its sums without a graph."""
        found = self.objective.chunk_sums(self.encoder, chunk)
        losses_k = torch.stack([found[term].loss for term in self.objective.terms])
        share = (losses_k * shares_k.to(losses_k)).sum()
        return share, {
            term: TokenSums(
                one.loss.detach(), {name: value.detach() for name, value in one.metrics.items()}
            )
            for term, one in found.items()
        }

    def _agree(self, chunks: list[TokenChunk], *, ran_out: bool, can_redo: bool) -> None:
        """End or repeat the step on all ranks, if memory ran out on one."""
        if self.strategy.equal_chunks:
            return
        max_texts = max((one.num_texts for one in chunks), default=0)
        hopeless = ran_out and not (can_redo and self.memory.take_less(0, max_texts=max_texts))
        worst = self.collectives.highest(ran_out + hopeless)
        if worst == 2:
            raise UserError(self.memory.ran_out())
        if worst == 1:
            raise StepMustBeDoneAgain

    def _means(
        self, sums: list[dict[str, TokenSums]], predicted: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics over all ranks' tokens."""
        terms = self.objective.terms
        own = torch.zeros(
            len(terms) + sum(map(len, terms.values())),
            dtype=self.encoder.dtype,
            device=self.encoder.device,
        )
        for one in sums:
            losses = [one[term].loss for term in terms]
            metrics = [one[term].metrics[name] for term in terms for name in terms[term]]
            own += torch.stack([value.to(own) for value in (*losses, *metrics)])
        of_metrics = [
            number for number, names in zip(predicted, terms.values(), strict=True) for _ in names
        ]
        counts = [*predicted, *of_metrics]
        divisors = torch.tensor([max(n, 1) for n in counts], dtype=own.dtype, device=own.device)
        means = self.collectives.sum(own) / divisors
        names = [name for metrics in terms.values() for name in metrics]
        return means[: len(terms)].sum(), dict(zip(names, means[len(terms) :], strict=True))

    def _chunks(self, task: TokenTask) -> list[TokenChunk]:
        assert self.memory.tokens_per_chunk is not None
        return self.encoder.make_token_chunks(
            task.texts, task.targets, self.memory.tokens_per_chunk
        )

    def _filler(self, task: TokenTask) -> TokenChunk:
        """Return a chunk of one token that counts for nothing."""
        text = Texts.from_lists([[self.encoder.pad_id]])
        ignored = {name: np.array([IGNORED], np.int32) for name in task.targets}
        (chunk,) = self.encoder.make_token_chunks(text, ignored, 1)
        return chunk._replace(lengths=np.zeros_like(chunk.lengths))
