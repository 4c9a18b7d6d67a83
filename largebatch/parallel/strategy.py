"""The interface between the loop and the way a model is spread over ranks.

The loop calls these and nothing else, so it runs unchanged on replicas, sharded parameters or
DeepSpeed's engine.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from largebatch.parallel.collectives import Collectives


class Strategy(Protocol):
    """How the model is spread over ranks. All ranks call the same methods in the same order."""

    collectives: Collectives

    def start_equal(self) -> None:
        """Give all ranks rank 0's weights and buffers."""

    def gradient_pass(self) -> AbstractContextManager[None]:
        """Run a step's backward passes inside; leaving averages their gradients, once."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them) and return their norm before."""
