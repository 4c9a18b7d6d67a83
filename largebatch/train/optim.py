"""The learning rate as a function of the step."""

import math

from largebatch.config import ScheduleConfig, TrainConfig


def learning_rate(step: int, config: ScheduleConfig, *, highest: float, max_steps: int) -> float:
    """Return the learning rate of a step, from 0 to `max_steps - 1`.

    Warm-up rises linearly, its last step at the highest rate. Then the rate falls to
    `final_fraction` of the highest, which it reaches after the last step: along half a cosine,
    along a line, or not at all; wsd (arXiv 2404.06395) stays at the highest rate until the last
    `decay_fraction` of the run, and falls along a line. inverse_sqrt (arXiv 1706.03762, eq. 3) has
    no end: step t, counted from 1, has the root of (steps of warm-up / t) of the highest.
    """
    warmup_steps = num_warmup_steps(config, max_steps)
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    # From the last step of the warm-up (0) to after the last step of the run (1): no step is lost.
    done = (step + 1 - warmup_steps) / (max_steps + 1 - warmup_steps)
    match config.name:
        case "constant":
            left = 1.0
        case "linear":
            left = 1 - done
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            left = min(1.0, (max_steps - step) / (config.decay_fraction * max_steps + 1))
        case "inverse_sqrt":
            left = math.sqrt(max(warmup_steps, 1) / (step + 1))
        case _:
            raise AssertionError(config.name)
    return highest * (config.final_fraction + (1 - config.final_fraction) * left)


def num_warmup_steps(config: ScheduleConfig, max_steps: int) -> int:
    """Return the steps of the warm-up: a number below 1 is a share of the run."""
    if 0 < config.warmup_steps < 1:
        return max(round(config.warmup_steps * max_steps), 1)
    return int(config.warmup_steps)


def highest_rate(config: TrainConfig) -> float:
    """Return the highest learning rate: optim.lr, scaled by the batch as the config asks for."""
    optim = config.optim
    if optim.lr_batch is None:
        return optim.lr
    ratio = config.global_batch / optim.lr_batch
    return optim.lr * (ratio if optim.lr_scaling == "linear" else math.sqrt(ratio))


def rate_in_force(config: TrainConfig) -> str:
    """Say in one line how high the learning rate rises, and what made it so."""
    optim, schedule = config.optim, config.schedule
    told = f"learning rate: {highest_rate(config):g}"
    if optim.lr_batch is not None:
        told += (
            f" (optim.lr={optim.lr:g} for {optim.lr_batch:,} pairs, {optim.lr_scaling} in the "
            f"batch of {config.global_batch:,})"
        )
    told += f", {schedule.name}, {num_warmup_steps(schedule, config.max_steps)} steps of warm-up"
    if optim.layer_decay != 1:
        told += f", times {optim.layer_decay:g} from layer to layer downwards"
    return told
