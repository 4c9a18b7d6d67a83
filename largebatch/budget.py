"""Memory budgets: which chunks keep how much, and how many tokens a chunk should have."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from largebatch.batch import Texts
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.keep import LEVELS, LevelCost, RandomState
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import backward as backward_locally
from largebatch.parallel.strategy import Strategy

log = logging.getLogger(__name__)

GIB = 2**30
FREE_SHARE = 0.8
"""Share of a GPU's free memory that `keep=auto` uses: the allocator's fragments take some."""


class KeepPlan(NamedTuple):
    """What was measured and decided about keeping."""

    costs: dict[str, LevelCost]
    """By level."""
    budget_bytes: int | None
    """What may be held from the forward to the backward passes. None: as much as it takes."""

    def levels(self, keep: str, chunk_tokens: Sequence[int]) -> list[str]:
        """Return the level of each chunk.

        Args:
            keep: One of LEVELS: all chunks at this level, or at none where the budget ends. auto:
                the levels that save the most for the budget.
            chunk_tokens: Tokens of each chunk, padding included.

        A little of every chunk saves more than much of a few. So every chunk is raised to the first
        level before any is raised to the second.
        """
        allowed = LEVELS[1:] if keep == "auto" else (keep,)
        if self.budget_bytes is None:
            return [allowed[-1]] * len(chunk_tokens)
        chosen = ["none"] * len(chunk_tokens)
        left = float(self.budget_bytes)
        for level in allowed:
            for number, tokens in enumerate(chunk_tokens):
                more = self.costs[level].bytes_per_token
                more -= self.costs[chosen[number]].bytes_per_token
                if level != "none" and tokens * more <= left:
                    left -= tokens * more
                    chosen[number] = level
        return chosen

    def units(self, chosen: Sequence[str], chunk_tokens: Sequence[int]) -> float:
        """Return the units of work of a step: forward 1, backward 2, and what is computed again."""
        total = max(sum(chunk_tokens), 1)
        again = sum(
            tokens * self.costs[level].recomputed
            for level, tokens in zip(chosen, chunk_tokens, strict=True)
        )
        return 3.0 + again / total

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, for JSON."""
        costs = {level: list(cost) for level, cost in self.costs.items()}
        return {"budget_bytes": self.budget_bytes, "costs": costs}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeepPlan":
        """Read what `to_dict` returned."""
        costs = {level: LevelCost(*cost) for level, cost in values["costs"].items()}
        return cls(costs, values["budget_bytes"])

    def agreed(self, collectives: Collectives, device: torch.device) -> "KeepPlan":
        """Return the highest costs and the lowest budget of all ranks, which all must call."""
        budget = float("inf") if self.budget_bytes is None else float(self.budget_bytes)
        numbers = [*(number for level in LEVELS for number in self.costs[level]), -budget]
        agreed = collectives.max(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
        costs = {level: LevelCost(*agreed[2 * i : 2 * i + 2]) for i, level in enumerate(LEVELS)}
        return KeepPlan(costs, None if agreed[-1] == -float("inf") else int(-agreed[-1]))


def measured_budget(encoder: Encoder, costs: dict[str, LevelCost], tokens_per_chunk: int) -> int:
    """Return the bytes that `keep=auto` may hold on this GPU.

    What the rest of a step will take is left free: a chunk's own graph and as much again for its
    gradients, and what AdamW and `.grad` have not taken yet.

    Raises:
        UserError: There is no GPU, and so nobody knows how much of the memory is ours.
    """
    if encoder.device.type != "cuda":
        raise UserError(
            "keep=auto needs keep_gib where there is no GPU: the GiB of memory that may be held "
            "for the backward pass, for example keep_gib=4"
        )
    free, _ = torch.cuda.mem_get_info(encoder.device)
    free += torch.cuda.memory_reserved(encoder.device)
    free -= torch.cuda.memory_allocated(encoder.device)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    missing = 3 * sum(p.nbytes for p in trained if p.grad is None)
    chunk = 2 * costs["all"].bytes_per_token * tokens_per_chunk
    return max(int(FREE_SHARE * (free - missing - chunk)), 0)


def choose_tokens_per_chunk(
    encoder: Encoder,
    texts: Texts,
    *,
    strategy: Strategy | None = None,
    smallest: int = 512,
    largest: int = 65536,
    tries: int = 3,
) -> int:
    """Return the power of two of tokens per chunk that gives the most tokens per second.

    Args:
        encoder: The encoder; its weights and the random state stay as they are, `.grad` is cleared.
        texts: A sample of this rank's texts, at best those of a batch.
        strategy: How the model is spread over ranks. None: this rank has all of it.
        smallest: First size tried, tokens.
        largest: Last size tried, tokens.
        tries: Passes over each chunk, of which the fastest counts.

    Raises:
        UserError: Not even the smallest size fits into the memory.

    Each size runs forward and backward passes over the longest texts and over those of middle
    length. Where a size does not fit, on any rank, the search ends with the best of those below;
    one that is not at least 2% faster than a smaller one is not worth its memory. All ranks must
    call it, and all get the same number.
    """
    collectives = Collectives()
    state = RandomState.of(encoder.device)
    if texts.num_texts == 0:
        texts = Texts.from_lists([[encoder.pad_id]])
    best, best_rate, size = 0, 0.0, smallest
    while size <= largest:
        rate, all_in_one = _tokens_per_s(encoder, texts, size, strategy, tries)
        # The slowest rank decides, and one that is out of memory is infinitely slow.
        worst = torch.tensor([-rate, -float(all_in_one)], dtype=torch.float64)
        slowest, missing = (-collectives.max(worst.to(encoder.device))).tolist()
        if slowest > 1.02 * best_rate:
            best, best_rate = size, slowest
        if slowest == 0 or missing == 1:
            break
        size *= 2
    (strategy or encoder).zero_grad()
    state.restore()
    if best == 0:
        raise UserError(
            f"tokens_per_chunk=auto: not even {smallest} tokens fit into the memory; use a smaller "
            "model or shorter texts"
        )
    log.info("tokens_per_chunk: %d (%.0f tokens/s on the slowest rank)", best, best_rate)
    return best


def _tokens_per_s(
    encoder: Encoder, texts: Texts, size: int, strategy: Strategy | None, tries: int
) -> tuple[float, bool]:
    """Return tokens per second of forward and backward passes, and whether one chunk holds all.

    0 tokens per second: out of memory. Every rank runs equally many passes.
    """
    forward = encoder if strategy is None else strategy.encoder
    plan, chunks = encoder.make_chunks(texts, size)
    seconds = tokens = 0.0
    with (
        nullcontext(backward_locally) if strategy is None else strategy.gradient_pass() as backward
    ):
        for half, number in enumerate((0, len(chunks) // 2)):
            fastest = float("inf")
            for again in range(tries, 0, -1):
                try:
                    _wait_for(encoder.device)
                    start = time.perf_counter()
                    embeddings = forward(chunks[number])
                    last = half == 1 and again == 1
                    backward([embeddings], [torch.ones_like(embeddings)], last=last)
                    _wait_for(encoder.device)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    return 0.0, False
                fastest = min(fastest, time.perf_counter() - start)
            seconds += fastest
            tokens += float(texts.lengths[plan[number]].sum())
    return max(tokens, 1.0) / seconds, len(chunks) == 1


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
