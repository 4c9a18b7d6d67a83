"""The temperature: fixed, learned, or a function of the step."""

import math

import torch
from torch import Tensor, nn

from largebatch.config import TEMPERATURE_SCHEDULES
from largebatch.errors import UserError


class Temperature(nn.Module):
    """Gives the logit scale, 1 / temperature, that similarities are multiplied with.

    A learned temperature is trained as the logarithm of the scale (CLIP, arXiv 2103.00020, section
    2.3). Its gradient is taken as if there were no bounds, so that it can leave a bound again;
    `clamp_` after each optimizer step keeps it inside.

    Args:
        value: The temperature, or where a learned one starts.
        learned: Whether it is a parameter.
        min: Lowest learned temperature.
        max: Highest learned temperature.
        final_value: The temperature from step `steps` on. Between step 0 and that step it follows
            `schedule`; it is a number of the step alone, so a resumed run has the same. None: it
            stays as it is.
        steps: See there.
        schedule: linear, or cosine (slow at both ends).

    Raises:
        UserError: `value` is not positive, a learned one starts outside its bounds, or has a
            schedule; or the schedule is none.
    """

    log_scale: Tensor

    def __init__(
        self,
        value: float = 0.05,
        *,
        learned: bool = False,
        min: float = 0.01,  # noqa: A002  the option is called temperature.min
        max: float = 1.0,  # noqa: A002
        final_value: float | None = None,
        steps: int = 0,
        schedule: str = "linear",
    ) -> None:
        super().__init__()
        if not value > 0:
            raise UserError(f"temperature {value} must be above 0")
        if learned and not 0 < min <= value <= max:
            raise UserError(f"a learned temperature must start in [{min}, {max}], not at {value}")
        if final_value is not None:
            if learned:
                raise UserError("a learned temperature has no final_value: training moves it")
            if not (final_value > 0 and steps > 0 and schedule in TEMPERATURE_SCHEDULES):
                raise UserError(
                    f"a temperature that goes to {final_value} (above 0) needs steps, not {steps}, "
                    f"and one of {', '.join(TEMPERATURE_SCHEDULES)}, not {schedule}"
                )
        log_scale = torch.tensor(math.log(1 / value))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.learned = learned
        self._start, self._end = value, final_value
        self._steps, self._schedule = steps, schedule
        self.lowest_log_scale = math.log(1 / max)
        self.highest_log_scale = math.log(1 / min)

    def forward(self, step: int = 0) -> Tensor:
        """Return the logit scale of a step, counted from 0: a scalar."""
        if self._end is None:
            return self.log_scale.exp()
        return torch.full_like(self.log_scale, 1 / self.at(step))

    def at(self, step: int) -> float:
        """Return the temperature of a step as a number; a learned one's waits for the device."""
        if self._end is None:
            return self.value
        part = min(step / self._steps, 1.0)
        if self._schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        # Exact at both ends.
        return (1 - part) * self._start + part * self._end

    @property
    def lowest(self) -> float:
        """The lowest temperature that it has, as a number (waits for the device)."""
        return self.value if self._end is None else min(self._start, self._end)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring a learned temperature back into its bounds."""
        if self.learned:
            self.log_scale.clamp_(self.lowest_log_scale, self.highest_log_scale)

    @property
    def value(self) -> float:
        """The temperature as a number, of step 0 if it has a schedule (waits for the device)."""
        return math.exp(-float(self.log_scale.detach()))
