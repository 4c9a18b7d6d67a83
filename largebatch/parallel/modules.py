"""What strategies share whose gradients lie in `.grad` and whose weights torch's AdamW moves.

Parameters may be plain tensors, whole on every rank, or DTensors, of which each rank has a shard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from largebatch.config import OptimConfig
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.optimizer import MOMENTS, make_optimizer, set_learning_rate
from largebatch.parallel.strategy import ENCODER


class OptimizedModules:
    """Modules, their optimizers, and what a checkpoint takes of them.

    Args:
        modules: The encoder, as the strategy has spread it, and the others, whole on every rank.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], optim: OptimConfig, collectives: Collectives
    ) -> None:
        self.modules = modules
        self.collectives = collectives
        encoder, others = split_modules(modules)
        self.encoder: Encoder = encoder
        self.whole_parameters = trained(*others.values())
        self.parameters = [*trained(encoder), *self.whole_parameters]
        self.num_parameters = sum(p.numel() for p in self.parameters)
        # Two, for one kernel can't take plain tensors and DTensors together.
        kinds = ([encoder], list(others.values()))
        self.optimizers = [make_optimizer(kind, optim) for kind in kinds if trained(*kind)]

    def missing_bytes(self) -> int:
        """Return what gradients and AdamW have still to take of this rank's device, at most."""
        return missing_bytes(self.parameters, self.optimizers)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them) and return their norm before."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self._norm(gradients)
        if max_norm > 0:
            factor = clip_factor(norm, max_norm)
            for gradient in gradients:
                local_part(gradient).mul_(factor)
        return norm

    def step(self, learning_rate: float) -> None:
        """Move the weights by AdamW."""
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def parameter_norm(self) -> Tensor:
        """Return the norm of all weights, a scalar."""
        return self._norm([p.detach() for p in self.parameters])

    def shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights."""
        return {name: tensor.shape for name, tensor in self._tensors()}

    def trained_shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights that the optimizer moves."""
        names = self._names_of_parameters()
        return {names[parameter]: parameter.shape for parameter in self.parameters}

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights by name on rank 0, nothing elsewhere."""
        return self._on_main(self._tensors())

    @torch.no_grad()
    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite all weights; every rank gives the whole tensors."""
        for name, tensor in self._tensors():
            local_part(tensor).copy_(local_part(as_placed(tensors[name], tensor)))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return exp_avg.NAME, exp_avg_sq.NAME and step.NAME on rank 0, nothing elsewhere."""
        names = self._names_of_parameters()
        return self._on_main(
            (f"{key}.{names[parameter]}", value)
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
        )

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's state; every rank gives the whole tensors."""
        names = self._names_of_parameters()
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = entries_of(tensors, names[parameter], parameter)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                yield f"{prefix}.{name}", tensor

    def _names_of_parameters(self) -> dict[Tensor, str]:
        return {
            parameter: f"{prefix}.{name}"
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    def _on_main(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Gather one tensor after another, so that only rank 0's host memory holds all."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
            if self.collectives.world.is_main:
                found[name] = whole
        return found

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm over tensors, of which those that are sharded add up over ranks."""
        sharded = [local_part(tensor) for tensor in tensors if isinstance(tensor, DTensor)]
        norm = nn.utils.get_total_norm([t for t in tensors if not isinstance(t, DTensor)])
        if not sharded:
            return norm
        of_shards = self.collectives.sum(nn.utils.get_total_norm(sharded).square()).sqrt()
        return torch.hypot(of_shards, norm.to(of_shards))


class Root(nn.Module):
    """What a wrapper goes around, so that its hooks bracket a whole function of the encoder.

    Args:
        encoder: The only module whose weights the wrapper sees.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what the function gives."""
        return function(*inputs)


def split_modules(modules: Mapping[str, nn.Module]) -> tuple[Any, dict[str, nn.Module]]:
    """Return the encoder, and the modules that stay whole on every rank."""
    return modules[ENCODER], {name: one for name, one in modules.items() if name != ENCODER}


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of modules that are trained."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def missing_bytes(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> int:
    """Return the bytes that the gradients of parameters and AdamW's moments have still to take.

    A sharded parameter's gradient is whole until it is reduced, whether or not there is one from
    before; its moments are as large as its shard.
    """
    missing = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None or isinstance(parameter, DTensor):
            missing += parameter.numel() * parameter.element_size()
        if not any(optimizer.state.get(parameter) for optimizer in optimizers):
            missing += 2 * local_part(parameter).nbytes
    return missing


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of that norm are multiplied by, as torch's `clip_grad_norm_` does."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@contextmanager
def missing_gradients_are_zeros(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Fill in, on leaving, what no backward pass inside has reached.

    Then AdamW treats it alike on any number of ranks, whichever of them have seen it.
    """
    yield
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def entries_of(
    tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter
) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter from a checkpoint's tensors."""
    entries = {"step": tensors[f"step.{name}"].to(parameter.device, torch.float32)}
    for key in MOMENTS:
        # In the parameter's own order of memory, which AdamW's fused kernel takes for granted.
        entries[key] = torch.empty_like(parameter, requires_grad=False)
        local_part(entries[key]).copy_(local_part(as_placed(tensors[f"{key}.{name}"], parameter)))
    return entries


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_placed(whole: Tensor, like: Tensor) -> Tensor:
    """Place a whole tensor as another one is: its type, device and shard."""
    whole = whole.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole
