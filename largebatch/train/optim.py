"""The learning rate as a function of the step."""

import math

from largebatch.config import ScheduleConfig


def learning_rate(step: int, config: ScheduleConfig, *, highest: float, max_steps: int) -> float:
    """Return the learning rate of a step, from 0 to `max_steps - 1`.

    Warm-up rises linearly, its last step at the highest rate. Then the rate falls to
    `final_fraction` of the highest, which it reaches after the last step: along half a cosine,
    along a line, or not at all; wsd (arXiv 2404.06395) stays at the highest rate until the last
    `decay_fraction` of the run, and falls along a line.
    """
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    # From the last step of the warm-up (0) to after the last step of the run (1): no step is lost.
    done = (step + 1 - config.warmup_steps) / (max_steps + 1 - config.warmup_steps)
    match config.name:
        case "constant":
            left = 1.0
        case "linear":
            left = 1 - done
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            left = min(1.0, (max_steps - step) / (config.decay_fraction * max_steps + 1))
        case _:
            raise AssertionError(config.name)
    return highest * (config.final_fraction + (1 - config.final_fraction) * left)
