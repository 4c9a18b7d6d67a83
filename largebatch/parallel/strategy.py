"""The interface between the loop and the way a model is spread over ranks.

The loop calls these and nothing else, so it runs unchanged on replicas, sharded parameters or
DeepSpeed's engine.

What is trained is a mapping of modules by name. The one called `encoder` is spread; all others are
small, and whole on every rank. A tensor is called by its module's name and its own, such as
`encoder.backbone.embeddings.weight`, whole and in the shape of the unwrapped module: what one
strategy saves, any other loads.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives

ENCODER = "encoder"
"""Name of the module that a strategy spreads."""


class Backward(Protocol):
    """Pushes the gradients of some chunks' outputs into the weights."""

    def __call__(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool
    ) -> None:
        """Back-propagate; each of the outputs has a graph of its own.

        Args:
            outputs: What `Strategy.run` returned for some chunks; none: nothing to do.
            gradients: As many tensors of the same shapes.
            last: Whether this is the step's last call on this rank.
        """


class Spread(Protocol):
    """How weights are spread over ranks: what a step must know to compute a gradient.

    All ranks call the same methods in the same order.
    """

    collectives: Collectives
    equal_chunks: bool
    """Whether every rank must run equally many forward and as many backward passes."""
    can_redo: bool
    """Whether all that backward passes do is to add to `.grad`: then a step that ran out of memory
    in its midst can be taken back and done again."""

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a function of inputs gives, with the encoder's weights in place.

        Every forward pass of training goes through here. The function may call the encoder once,
        and other modules as it likes.
        """

    def gradient_pass(self) -> AbstractContextManager[Backward]:
        """Run a step's backward passes inside; leaving averages their gradients, once.

        Gradients of the encoder are made by what the context gives, those of the other modules by
        that or by plain autograd. A gradient from before, the same on all ranks, is added to by
        ddp and fsdp; DeepSpeed begins anew.
        """

    def missing_bytes(self) -> int:
        """Return what gradients and AdamW have still to take of this rank's device, at most.

        Until the step's reduction a rank holds the whole gradient of its own chunks; of AdamW's
        state it holds its share.
        """

    def zero_grad(self) -> None:
        """Forget the gradients."""


class Strategy(Spread, Protocol):
    """How the model is spread over ranks, moved, saved and restored."""

    modules: Mapping[str, nn.Module]
    """All that is trained, by name."""
    num_parameters: int
    """Trained numbers of all modules."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them) and return their norm before.

        The norm is over all modules.
        """

    def step(self, learning_rate: float) -> None:
        """Move the weights by AdamW."""

    def parameter_norm(self) -> Tensor:
        """Return the norm of all weights, a scalar."""

    def whole(self) -> AbstractContextManager[Encoder]:
        """Give the encoder with all of its weights, which a rank can run without the others."""

    def shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights."""

    def trained_shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights that the optimizer moves."""

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights by name on rank 0, nothing elsewhere."""

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite all weights; every rank gives the whole tensors."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return exp_avg.NAME, exp_avg_sq.NAME and step.NAME on rank 0, nothing elsewhere.

        Each weight of `trained_shapes` has the three, once a step was taken.
        """

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's state; every rank gives the whole tensors."""
