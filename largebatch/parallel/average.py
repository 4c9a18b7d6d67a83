"""The moving average of an encoder's weights, beside the weights that are trained.

Polyak and Juditsky's average in its exponential form: after each step
`average = decay * average + (1 - decay) * weights`, from the weights that the run began with on. A
rank holds the average of its own share in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from largebatch.model.encoder import Encoder
from largebatch.parallel.modules import as_placed, local_part
from largebatch.parallel.strategy import ENCODER, Strategy


class WeightAverage:
    """The moving average of the encoder's trained weights.

    Args:
        strategy: Holds them: ddp or fsdp, whose weights are plain tensors or DTensors.
        decay: Share of the average that a step leaves of it.
    """

    def __init__(self, strategy: Strategy, decay: float) -> None:
        self.strategy = strategy
        self.decay = decay
        self._weights = {
            f"{ENCODER}.{name}": p
            for name, p in strategy.modules[ENCODER].named_parameters()
            if p.requires_grad
        }
        self._averages = {
            name: local_part(p).detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Follow a step of the optimizer."""
        weights = [local_part(p).detach() for p in self._weights.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.decay)

    @contextmanager
    def whole(self) -> Iterator[Encoder]:
        """Give the averaged encoder whole, as `Strategy.whole` gives the trained one."""
        with self._in_place(), self.strategy.whole() as encoder:
            yield encoder

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole averages by name on rank 0, nothing elsewhere; called by all ranks."""
        with self._in_place():
            found = self.strategy.weights()
            return {name: t.clone() for name, t in found.items() if name in self._averages}

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the averages; every rank gives the whole tensors."""
        for name, weight in self._weights.items():
            self._averages[name].copy_(local_part(as_placed(tensors[name], weight)))

    def shapes(self) -> dict[str, torch.Size]:
        """Return the names and whole shapes of what is averaged."""
        return {name: weight.shape for name, weight in self._weights.items()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the averages where the weights are, which come back afterwards in every bit."""
        kept = {name: local_part(p).detach().clone() for name, p in self._weights.items()}
        self._overwrite(self._averages)
        try:
            yield
        finally:
            self._overwrite(kept)

    @torch.no_grad()
    def _overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            local_part(weight).copy_(tensors[name])
