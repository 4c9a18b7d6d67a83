"""The memory of a step: how large chunks are, and which of them keep their graph.

A chunk that keeps its graph from the forward to the backward pass is embedded once, not twice. What
else could be kept is between the two in memory and time, and was no faster than whole graphs of
some chunks in the same memory (benchmarks/results/keep.md).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from largebatch.batch import Chunk
from largebatch.config import KEEPS
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import free_bytes
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.strategy import Spread

log = logging.getLogger(__name__)

GIB = 2**30
FREE_SHARE = 0.8
"""Share of a GPU's free memory that is counted on: the allocator's fragments take some."""


class KeepPlan(NamedTuple):
    """What was measured and decided about keeping."""

    bytes_per_token: float
    """What a chunk's graph holds, for each of its tokens, padding included."""
    budget_bytes: int
    """What all graphs together may hold."""

    def keeps(self, chunk_tokens: Sequence[int]) -> list[bool]:
        """Return which chunks keep their graph: one after another, each that still fits.

        Args:
            chunk_tokens: Tokens of each chunk, padding included.
        """
        chosen = []
        left = float(self.budget_bytes)
        for tokens in chunk_tokens:
            fits = tokens * self.bytes_per_token <= left
            left -= tokens * self.bytes_per_token if fits else 0
            chosen.append(fits)
        return chosen

    def agreed(self, collectives: Collectives) -> "KeepPlan":
        """Return the highest cost and the lowest budget of all ranks, which all must call."""
        numbers = torch.tensor([self.bytes_per_token, -float(self.budget_bytes)])
        cost, budget = collectives.max(numbers.double()).tolist()
        return KeepPlan(cost, int(-budget))


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
        """Whether `keeps` needs a plan that is not there yet."""
        has_budget = self.keep == "auto" or (self.keep == "all" and self.keep_gib is not None)
        return has_budget and self.keep_plan is None

    def budget_bytes(self, encoder: Encoder, bytes_per_token: float, strategy: Spread) -> int:
        """Return what graphs may hold, as asked for or as is free on this GPU."""
        if self.keep_gib is not None:
            return int(self.keep_gib * GIB)
        assert self.tokens_per_chunk is not None
        return measured_budget(encoder, bytes_per_token * self.tokens_per_chunk, strategy)

    def keeps(self, chunk_tokens: Sequence[int]) -> list[bool]:
        """Return whether each chunk keeps its graph."""
        if self.keep_plan is None:
            return [self.keep != "none"] * len(chunk_tokens)
        return self.keep_plan.keeps(chunk_tokens)

    def take_less(self, kept_tokens: int, *, max_texts: int) -> bool:
        """Take less from here on, on this rank; return whether that is possible.

        Args:
            kept_tokens: Tokens of the chunks whose graphs were in memory when it ran out.
            max_texts: Texts in the largest chunk.
        """
        assert self.tokens_per_chunk is not None
        if kept_tokens:
            if self.keep_plan is None:
                self.keep = "none"
                log.warning("out of memory with keep=all: going on with keep=none (see keep_gib)")
            else:
                half = int(kept_tokens * self.keep_plan.bytes_per_token) // 2
                self.keep_plan = self.keep_plan._replace(budget_bytes=half)
                log.warning("out of memory: keeping %.2f GiB at most from here on", half / GIB)
            return True
        if max_texts <= 1:
            return False
        self.tokens_per_chunk = max(self.tokens_per_chunk // 2, 1)
        log.warning("out of memory: going on with tokens_per_chunk=%d", self.tokens_per_chunk)
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return what it has come to on this rank, as plain numbers, for JSON."""
        plan = None if self.keep_plan is None else self.keep_plan._asdict()
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


def graph_bytes(
    forward: Callable[[Chunk], Tensor], chunk: Chunk, parameters: Sequence[nn.Parameter]
) -> int:
    """Return the bytes that a chunk's graph holds, by one forward pass whose graph is thrown away.

    Args:
        forward: The encoder, or what a strategy makes of it.
        chunk: Some chunk, a long one rather than a short one.
        parameters: The encoder's; they are held anyway, and don't count.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    whole = [p for p in parameters if not hasattr(p, "to_local")]
    own = {p.untyped_storage().data_ptr() for p in whole}

    def count(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        # A weight that was gathered from its shards is none of `parameters`, and no chunk's own.
        if not isinstance(source, nn.Parameter) and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    # The graph holds what was counted until the end: no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        embeddings = forward(chunk)
    held = sum(storage.nbytes() for storage in storages.values())
    del embeddings
    return held


def measured_budget(encoder: Encoder, chunk_bytes: float, strategy: Spread) -> int:
    """Return the bytes that `keep=auto` may hold on this GPU.

    What the rest of a step will take is left free: a chunk's own graph (`chunk_bytes`) and as much
    again for its gradients, and what `.grad` and AdamW have not taken yet on this rank.

    Raises:
        UserError: There is no GPU, and so nobody knows how much of the memory is ours.
    """
    if encoder.device.type != "cuda":
        raise UserError(
            "keep=auto needs keep_gib where there is no GPU: the GiB of memory that may be held "
            "for the backward pass, for example keep_gib=4"
        )
    free = free_bytes(encoder.device) - strategy.missing_bytes() - 2 * chunk_bytes
    return max(int(FREE_SHARE * free), 0)
