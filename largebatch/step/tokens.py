"""The step of an objective that is a sum over tokens: nothing is gathered, no chunk is seen twice.

1. Balance: ranks exchange pairs, so that they have equally many tokens (balance.py).
2. Ranks tell each other how many tokens each predicts, and how many chunks it has.
3. Each chunk goes forward and backward at once. A rank's sum is divided by (predicted tokens of all
   ranks / world size), the plain mean where ranks have equally many.
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
        objective.meet(encoder)
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
            message = np.array([task.num_predicted, num_own, state_hash(device)], np.int64)
            predicted, counts, states = zip(
                *(told.tolist() for told in self.collectives.gather_ragged(message)), strict=True
            )
        if sum(predicted) == 0:
            raise UserError("nothing of the global batch is to be predicted: its texts are empty")
        if self.strategy.equal_chunks:
            chunks += [self._filler(task)] * (max(counts) - num_own)
        mean = torch.tensor(world.size / sum(predicted), dtype=self.encoder.dtype, device=device)
        sums: list[TokenSums] = []
        with self.strategy.gradient_pass() as backward:
            with masks_of_rank(states, world.rank, device):
                ran_out = not self._passes(chunks, mean, backward, sums)
            self._agree(chunks, ran_out=ran_out, can_redo=can_redo)
        loss, metrics = self._means(sums, sum(predicted))
        own = chunks[:num_own]
        return StepReport(
            loss,
            metrics,
            torch.stack([one.loss for one in sums]).isfinite().all()
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
        mean: Tensor,
        backward: Backward,
        sums: list[TokenSums],
    ) -> bool:
        """Run all chunks forward and backward; return False if memory ran out."""
        try:
            for number, chunk in enumerate(chunks, start=1):
                with phase("embed"):
                    one = self.strategy.run(self.objective.chunk_sums, self.encoder, chunk)
                with phase("replay"):
                    backward([one.loss], [mean.to(one.loss)], last=number == len(chunks))
                sums.append(
                    TokenSums(
                        one.loss.detach(),
                        {name: value.detach() for name, value in one.metrics.items()},
                    )
                )
            if not chunks:
                backward([], [], last=True)
        except torch.OutOfMemoryError:
            if self.strategy.equal_chunks:
                raise UserError(self.memory.ran_out()) from None
            return False
        return True

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

    def _means(self, sums: list[TokenSums], num_predicted: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics over all ranks' tokens."""
        names = self.objective.metric_names
        own = torch.zeros(1 + len(names), dtype=self.encoder.dtype, device=self.encoder.device)
        for one in sums:
            own += torch.stack([one.loss, *(one.metrics[name] for name in names)]).to(own)
        means = self.collectives.sum(own) / num_predicted
        return means[0], dict(zip(names, means[1:], strict=True))

    def _chunks(self, task: TokenTask) -> list[TokenChunk]:
        assert self.memory.tokens_per_chunk is not None
        return self.encoder.make_token_chunks(
            task.texts, task.targets, self.memory.tokens_per_chunk
        )

    def _filler(self, task: TokenTask) -> TokenChunk:
        """Return a chunk of one token, of which nothing is predicted."""
        text = Texts.from_lists([[self.encoder.pad_id]])
        ignored = {name: np.array([IGNORED], np.int32) for name in task.targets}
        (chunk,) = self.encoder.make_token_chunks(text, ignored, 1)
        return chunk
