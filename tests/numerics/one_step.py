"""One step as `train_step` takes it, on this rank, for tests of how it treats its device."""

import numpy as np
import torch
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    rank_batch,
    tiny_encoder,
    tiny_loss,
)
from torch import Tensor

from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.step.gradcache import GradCache, StepReport
from largebatch.world import part_of_rank

NEGATIVES = [[7, 8, 9], [10] * 20, DOCUMENTS[0]]


class Step:
    """Takes one step at each call; tiny texts, some of them twice, so that masks are at work."""

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        keep: str = "none",
        symmetric: bool = True,
        dropout: float = 0.1,
        packing: str = "off",
        negatives: bool = False,
        autocast: torch.dtype | None = None,
        **settings: object,
    ) -> None:
        self.encoder = tiny_encoder(
            dropout=dropout, dtype=torch.float32, packing=packing, **settings
        ).to(device)
        self.encoder.autocast_dtype = autocast
        self.loss = tiny_loss(symmetric=symmetric, dtype=torch.float32).to(device)
        collectives = Collectives()
        self.strategy = ReplicatedModel(
            {"encoder": self.encoder, "objective": self.loss}, OptimConfig(), collectives
        )
        if self.encoder.device.type == "meta":  # where no fused kernel is
            for optimizer in self.strategy.optimizers:
                for group in optimizer.param_groups:
                    group |= {"fused": False, "foreach": True}
        self.cache = GradCache(
            self.encoder, self.loss, tokens_per_chunk=64, keep=keep, strategy=self.strategy
        )
        rows = part_of_rank(NUM_PAIRS, collectives.world.rank, collectives.world.size)
        documents = [*DOCUMENTS[:5], DOCUMENTS[3], *DOCUMENTS[6:]]
        self.texts = [Texts.from_lists([side[i] for i in rows]) for side in (QUERIES, documents)]
        self.negatives = Texts.from_lists(NEGATIVES if negatives else [])
        self.ids = [f"record {i}" for i in rows]

    def gradient(self) -> StepReport:
        """Add the gradient to `.grad`."""
        return self.cache.accumulate(rank_batch(*self.texts, self.negatives, ids=self.ids))

    def __call__(self) -> StepReport:
        report = self.gradient()
        self.strategy.clip_gradients(1.0)
        self.strategy.step(1e-3)
        self.strategy.zero_grad()
        self.loss.after_step()
        return report


def gradients_of(step: Step) -> dict[str, np.ndarray]:
    """Return the gradients of a step by name, on the host; `.grad` is cleared."""
    step.gradient()
    found: dict[str, np.ndarray] = {}
    for module in (step.encoder, step.loss):
        for name, parameter in module.named_parameters():
            if isinstance(parameter.grad, Tensor):
                found[name] = parameter.grad.double().cpu().numpy()
    step.strategy.zero_grad()
    return found
