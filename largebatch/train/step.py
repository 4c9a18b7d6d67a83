"""One optimizer step: the file to read first.

1. The learning rate is a function of the step.
2. GradCache embeds this rank's texts, contrasts them with those of all ranks, and puts the gradient
   of the global batch into `.grad`, the same on all ranks (see step/gradcache.py).
3. The gradient is clipped by its norm over all parameters, the temperature's included.
4. AdamW moves the weights; a learned temperature is brought back into its bounds.
"""

from typing import NamedTuple

from torch import Tensor

from largebatch.batch import RankBatch
from largebatch.config import TrainConfig
from largebatch.out_of_memory import ends_with
from largebatch.parallel.strategy import Strategy
from largebatch.phases import phase
from largebatch.step.gradcache import GradCache, StepReport
from largebatch.train.optim import learning_rate

OPTIMIZER_RAN_OUT = (
    "the optimizer ran out of memory, which holds two numbers for each weight beside its gradient: "
    "use strategy=fsdp or strategy=deepspeed, more ranks, or a smaller model"
)


class StepResult(NamedTuple):
    """What a step found out; tensors have not been waited for."""

    report: StepReport
    grad_norm: Tensor
    """Scalar, before clipping."""
    learning_rate: float


def train_step(
    batch: RankBatch,
    *,
    grad_cache: GradCache,
    strategy: Strategy,
    config: TrainConfig,
) -> StepResult:
    """Take one optimizer step on a global batch, of which `batch` is this rank's part."""
    rate = learning_rate(
        batch.step, config.schedule, highest=config.optim.lr, max_steps=config.max_steps
    )
    report = grad_cache.report(
        batch.queries,
        batch.documents,
        batch.negatives,
        symmetric=batch.symmetric,
        ids=batch.same_ids,
    )
    with phase("optimizer"), ends_with(lambda: OPTIMIZER_RAN_OUT):
        grad_norm = strategy.clip_gradients(config.optim.clip_norm)
        strategy.step(rate)
        strategy.zero_grad()
        grad_cache.loss.temperature.clamp_()
    return StepResult(report, grad_norm, rate)
