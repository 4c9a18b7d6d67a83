"""The temperature, fixed or learned."""

import math

import torch
from torch import Tensor, nn

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

    Raises:
        UserError: `value` is not positive, or a learned one starts outside its bounds.
    """

    log_scale: Tensor

    def __init__(
        self,
        value: float = 0.05,
        *,
        learned: bool = False,
        min: float = 0.01,  # noqa: A002  the option is called temperature.min
        max: float = 1.0,  # noqa: A002
    ) -> None:
        super().__init__()
        if not value > 0:
            raise UserError(f"temperature {value} must be above 0")
        if learned and not 0 < min <= value <= max:
            raise UserError(f"a learned temperature must start in [{min}, {max}], not at {value}")
        log_scale = torch.tensor(math.log(1 / value))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.learned = learned
        self.lowest_log_scale = math.log(1 / max)
        self.highest_log_scale = math.log(1 / min)

    def forward(self) -> Tensor:
        """Return the logit scale, a scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring a learned temperature back into its bounds."""
        if self.learned:
            self.log_scale.clamp_(self.lowest_log_scale, self.highest_log_scale)

    @property
    def value(self) -> float:
        """The temperature as a number (waits for the device)."""
        return math.exp(-float(self.log_scale.detach()))
