"""Plain data parallelism: every rank holds the whole model, gradients are averaged once per step.

torch's DistributedDataParallel would reduce during the last backward pass; but ranks differ in the
number of their chunks, some have none, and the temperature lies outside the encoder. One all-reduce
of all gradients, after the last chunk, is right for all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.parallel.collectives import Collectives


class ReplicatedModel:
    """The strategy `ddp`.

    Args:
        modules: Encoder and loss; their parameters are trained together.
        collectives: How ranks reach each other.
    """

    def __init__(self, modules: Sequence[nn.Module], collectives: Collectives) -> None:
        self.modules = modules
        self.collectives = collectives
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]

    def start_equal(self) -> None:
        """Give all ranks rank 0's weights and buffers."""
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.collectives.broadcast_(tensor.data)

    def gradient_pass(self) -> AbstractContextManager[None]:
        """Run a step's backward passes inside; leaving averages their gradients, once."""
        return one_reduction(self.parameters, self.collectives)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them) and return their norm before."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm


@contextmanager
def one_reduction(parameters: Sequence[nn.Parameter], collectives: Collectives) -> Iterator[None]:
    """Run backward passes inside; leaving averages the gradients over ranks in one all-reduce.

    A gradient that was there before, the same on all ranks, is kept and added to. With one rank
    nothing is done.
    """
    yield
    if collectives.world.size > 1:
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
