"""Memory budgets: which chunks keep how much, and how many tokens a chunk should have."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from largebatch.config import KEEPS
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import free_bytes
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.modules import missing_bytes
from largebatch.parallel.strategy import Strategy
from largebatch.step.keep import LEVELS, LevelCost

log = logging.getLogger(__name__)

GIB = 2**30
FREE_SHARE = 0.8
"""Share of a GPU's free memory that is counted on: the allocator's fragments take some."""


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
        allowed = self.worthwhile if keep == "auto" else [keep]
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

    @property
    def worthwhile(self) -> list[str]:
        """The levels that are worth their memory, from the least of it to the most.

        Each is at least 2% faster than those that hold less. In a narrow model it may take longer
        to keep the parts of a graph than to compute them again.
        """
        found = ["none"]
        for level in LEVELS[1:]:
            seconds, best = (self.costs[one].seconds_per_token for one in (level, found[-1]))
            if best == 0 or seconds < 0.98 * best:
                found.append(level)
        return found

    def held_bytes(self, chosen: Sequence[str], chunk_tokens: Sequence[int]) -> int:
        """Return what chunks at these levels hold from the forward to the backward passes."""
        costs = (self.costs[level].bytes_per_token for level in chosen)
        return int(sum(cost * n for cost, n in zip(costs, chunk_tokens, strict=True)))

    def units(self, chosen: Sequence[str], chunk_tokens: Sequence[int]) -> float:
        """Return the units of work of a step: forward 1, backward 2, and what is computed again."""
        total = max(sum(chunk_tokens), 1)
        again = sum(
            tokens * self.costs[level].recomputed
            for level, tokens in zip(chosen, chunk_tokens, strict=True)
        )
        return 3.0 + again / total

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, for JSON; None stands for infinity."""
        costs = {
            level: [number if math.isfinite(number) else None for number in cost]
            for level, cost in self.costs.items()
        }
        return {"budget_bytes": self.budget_bytes, "costs": costs}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeepPlan":
        """Read what `to_dict` returned."""
        costs = {
            level: LevelCost(*(math.inf if number is None else number for number in cost))
            for level, cost in values["costs"].items()
        }
        return cls(costs, values["budget_bytes"])

    def agreed(self, collectives: Collectives) -> "KeepPlan":
        """Return the highest costs and the lowest budget of all ranks, which all must call."""
        budget = float("inf") if self.budget_bytes is None else float(self.budget_bytes)
        numbers = [*(number for level in LEVELS for number in self.costs[level]), -budget]
        agreed = collectives.max(torch.tensor(numbers, dtype=torch.float64)).tolist()
        costs = {level: LevelCost(*agreed[3 * i : 3 * i + 3]) for i, level in enumerate(LEVELS)}
        return KeepPlan(costs, None if agreed[-1] == -float("inf") else int(-agreed[-1]))


class StepMemory:
    """How much memory a step takes: what was asked for, and what it has come to.

    Args:
        tokens_per_chunk: See GradCache. None: not chosen yet.
        keep: See GradCache.
        keep_gib: See GradCache.

    Raises:
        UserError: One of them is not what it must be.
    """

    def __init__(self, tokens_per_chunk: int | None, keep: str, keep_gib: float | None) -> None:
        if tokens_per_chunk is not None and tokens_per_chunk < 1:
            raise UserError(f"tokens_per_chunk={tokens_per_chunk} must be at least 1")
        if keep not in KEEPS:
            raise UserError(f"keep={keep!r} is not one of {', '.join(KEEPS)}")
        if keep_gib is not None and keep_gib < 0:
            raise UserError(f"keep_gib={keep_gib} must be at least 0")
        self.tokens_per_chunk = tokens_per_chunk
        self.keep = keep
        self.keep_gib = keep_gib
        self.keep_plan: KeepPlan | None = None
        """What the first step measured; None if there was nothing to decide."""

    @property
    def must_be_measured(self) -> bool:
        """Whether `levels` needs a plan that is not there yet."""
        is_given = self.keep in ("none", "all") and self.keep_gib is None
        return not is_given and self.keep_plan is None

    def budget_bytes(
        self, encoder: Encoder, costs: dict[str, LevelCost], strategy: Strategy | None
    ) -> int | None:
        """Return what may be held for the backward pass; None: as much as it takes."""
        if self.keep_gib is not None:
            return int(self.keep_gib * GIB)
        if self.keep != "auto":
            return None
        assert self.tokens_per_chunk is not None
        return measured_budget(encoder, costs, self.tokens_per_chunk, strategy)

    def levels(self, chunk_tokens: Sequence[int]) -> list[str]:
        """Return what each chunk keeps."""
        if self.keep_plan is None:
            return [self.keep] * len(chunk_tokens)
        return self.keep_plan.levels(self.keep, chunk_tokens)

    def units(self, passes: Sequence[tuple[str, int]]) -> float:
        """Return the units of work of a step whose chunks had these levels and tokens."""
        if self.keep_plan is None:
            return 4.0 if any(level == "none" for level, _ in passes) else 3.0
        return self.keep_plan.units([level for level, _ in passes], [n for _, n in passes])

    def take_less(self, held: Sequence[tuple[str, int]], *, most_texts: int) -> bool:
        """Take less from here on, on this rank; return whether that is possible.

        Args:
            held: Levels and tokens of the chunks in memory when it ran out.
            most_texts: Texts in the largest of them.
        """
        assert self.tokens_per_chunk is not None
        if any(level != "none" for level, _ in held):
            if self.keep_plan is None:
                self.keep = "none"
                log.warning("out of memory with keep=all: going on with keep=none (see keep_gib)")
            else:
                half = self.keep_plan.held_bytes(*zip(*held, strict=True)) // 2
                self.keep_plan = self.keep_plan._replace(budget_bytes=half)
                log.warning("out of memory: keeping %.2f GiB at most from here on", half / GIB)
            return True
        if most_texts <= 1:
            return False
        self.tokens_per_chunk = max(self.tokens_per_chunk // 2, 1)
        log.warning("out of memory: going on with tokens_per_chunk=%d", self.tokens_per_chunk)
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return what it has come to on this rank, as plain numbers, for JSON."""
        plan = None if self.keep_plan is None else self.keep_plan.to_dict()
        return {"tokens_per_chunk": self.tokens_per_chunk, "keep": self.keep, "keep_plan": plan}

    def ran_out(self) -> str:
        """Return what to tell the user where memory ran out and no less can be taken."""
        less = max((self.tokens_per_chunk or 2) // 2, 1)
        return (
            f"a step ran out of memory (tokens_per_chunk={self.tokens_per_chunk}, keep={self.keep})"
            f": use tokens_per_chunk={less} or a lower keep or keep_gib, with which the same "
            "command goes on from the last checkpoint; or, in a new run, a smaller global_batch or "
            "shorter texts"
        )


def measured_budget(
    encoder: Encoder,
    costs: dict[str, LevelCost],
    tokens_per_chunk: int,
    strategy: Strategy | None = None,
) -> int:
    """Return the bytes that `keep=auto` may hold on this GPU.

    What the rest of a step will take is left free: a chunk's own graph and as much again for its
    gradients, and what `.grad` and AdamW have not taken yet on this rank.

    Raises:
        UserError: There is no GPU, and so nobody knows how much of the memory is ours.
    """
    if encoder.device.type != "cuda":
        raise UserError(
            "keep=auto needs keep_gib where there is no GPU: the GiB of memory that may be held "
            "for the backward pass, for example keep_gib=4"
        )
    missing = (
        missing_bytes(list(encoder.parameters())) if strategy is None else strategy.missing_bytes()
    )
    chunk = 2 * costs["all"].bytes_per_token * tokens_per_chunk
    return max(int(FREE_SHARE * (free_bytes(encoder.device) - missing - chunk)), 0)
