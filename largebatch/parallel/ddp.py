"""Plain data parallelism: every rank holds the whole model, gradients are averaged once per step.

torch's DistributedDataParallel would reduce during the last backward pass; but ranks differ in the
number of their chunks, some have none, and the temperature lies outside the encoder. One all-reduce
of all gradients, after the last chunk, is right for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.modules import (
    OptimizedModules,
    missing_bytes,
    missing_gradients_are_zeros,
    trained,
)
from largebatch.parallel.strategy import Backward
from largebatch.phases import phase


class Replicas:
    """Passes over modules that are whole on every rank, and the average of their gradients.

    Args:
        modules: The encoder and what is trained beside it.
        collectives: How ranks reach each other.
    """

    equal_chunks = False
    can_redo = True

    def __init__(self, modules: Iterable[nn.Module], collectives: Collectives) -> None:
        self.parameters = trained(*modules)
        self.collectives = collectives

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a function of inputs gives: the weights are in place."""
        return function(*inputs)

    @contextmanager
    def gradient_pass(self) -> Iterator[Backward]:
        """Run a step's backward passes inside; leaving averages their gradients, once."""
        with one_reduction(self.parameters, self.collectives):
            yield backward

    def missing_bytes(self) -> int:
        """Return what gradients and AdamW have still to take of this rank's device, at most."""
        return missing_bytes(self.parameters)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class ReplicatedModel(OptimizedModules, Replicas):
    """The strategy `ddp`.

    Args:
        modules: The encoder and what is trained beside it; all ranks get rank 0's weights.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
        device: Of this rank.
        config: Has nothing for this strategy.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optim: OptimConfig,
        collectives: Collectives,
        device: torch.device | None = None,  # noqa: ARG002
        config: StrategyConfig | None = None,  # noqa: ARG002
    ) -> None:
        start_equal(modules.values(), collectives)
        super().__init__(modules, optim, collectives)

    @contextmanager
    def gradient_pass(self) -> Iterator[Backward]:
        """Run a step's backward passes inside; leaving averages their gradients, once."""
        with super().gradient_pass() as backward, missing_gradients_are_zeros(self.parameters):
            yield backward

    @contextmanager
    def whole(self) -> Iterator[Encoder]:
        """Give the encoder itself, which each rank has all of."""
        yield self.encoder


def start_equal(modules: Iterable[nn.Module], collectives: Collectives) -> None:
    """Give all ranks rank 0's weights and buffers."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            collectives.broadcast_(tensor.data)


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:  # noqa: ARG001
    """Push gradients into the weights, adding to `.grad`; all graphs in one pass."""
    if outputs:
        torch.autograd.backward(list(outputs), list(gradients))


@contextmanager
def one_reduction(parameters: Sequence[nn.Parameter], collectives: Collectives) -> Iterator[None]:
    """Run backward passes inside; leaving averages the gradients over ranks in one all-reduce.

    A gradient that was there before, the same on all ranks, is kept and added to. With one rank
    nothing is done.
    """
    yield
    if collectives.world.size > 1:
        with phase("sync"):
            average_gradients([p for p in parameters if p.requires_grad], collectives.world.size)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Replace each `.grad` by its mean over ranks; a missing one counts as zeros.

    One all-reduce for each data type among the gradients.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
