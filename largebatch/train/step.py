"""One optimizer step: the file to read first.

1. The learning rate is a function of the step.
2. The gradient of the global batch comes into `.grad`, the same on all ranks, in the memory of one
   chunk (see step/gradcache.py).
3. It is clipped by its norm over all parameters, those of the objective included.
4. AdamW moves the weights; the objective does what follows, such as bounding a temperature.
"""

from typing import NamedTuple

from torch import Tensor

from largebatch.batch import RankBatch
from largebatch.config import TrainConfig
from largebatch.out_of_memory import ends_with
from largebatch.parallel.strategy import Strategy
from largebatch.phases import phase
from largebatch.step.objective import Objective, Step, StepReport
from largebatch.train.optim import highest_rate, learning_rate

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
    engine: Step,
    objective: Objective,
    strategy: Strategy,
    config: TrainConfig,
) -> StepResult:
    """Take one optimizer step on a global batch, of which `batch` is this rank's part."""
    rate = learning_rate(
        batch.step, config.schedule, highest=highest_rate(config), max_steps=config.max_steps
    )
    report = engine.accumulate(batch)
    with phase("optimizer"), ends_with(lambda: OPTIMIZER_RAN_OUT):
        grad_norm = strategy.clip_gradients(config.optim.clip_norm)
        strategy.step(rate)
        strategy.zero_grad()
        objective.after_step()
    return StepResult(report, grad_norm, rate)
