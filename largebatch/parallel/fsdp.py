"""Sharded parameters: torch's fully_shard, a unit per layer and one for the rest.

Each rank keeps its share of weights, gradients and optimizer state; a layer's weights are gathered
when it runs. fully_shard reduces a unit's gradient after each backward pass through it; here that
is off for all but the step's last pass, so there is one reduce-scatter per unit and step. Until
then each rank holds the whole gradient of its own chunks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.model.compiled import layers_of
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import one_reduction, start_equal
from largebatch.parallel.modules import (
    OptimizedModules,
    Root,
    missing_gradients_are_zeros,
    split_modules,
)
from largebatch.parallel.strategy import Backward


class FullyShardedModel(OptimizedModules):
    """The strategy `fsdp`.

    Args:
        modules: The whole encoder, of which each rank keeps its share, and what is trained beside
            it and stays whole; all ranks get rank 0's weights.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
        device: Of this rank.
        config: Whether a layer's gathered weights are freed after its forward pass and gathered
            again for its backward pass.

    Raises:
        UserError: A weight has no dimension that it could be shared out by.

    Under bf16 autocast weights are gathered in bf16. The shards, the sum of the chunks' gradients
    and its reduction stay float32, and so does what flows between layers.
    """

    equal_chunks = True
    can_redo = False

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optim: OptimConfig,
        collectives: Collectives,
        device: torch.device | None = None,  # noqa: ARG002
        config: StrategyConfig | None = None,
    ) -> None:
        start_equal(modules.values(), collectives)
        encoder, _ = split_modules(modules)
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 0:
                raise UserError(
                    f"strategy=fsdp can't share out the weight {name}, which is a single number; "
                    "give it the shape [1], or use strategy=ddp"
                )
        self._skeleton = skeleton_of(encoder)
        mesh = init_device_mesh(encoder.device.type, (collectives.world.size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if encoder.autocast_dtype is not None:
            policy = MixedPrecisionPolicy(
                param_dtype=encoder.autocast_dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            )
        reshards = config is None or config.reshard_after_forward
        self._root = Root(encoder)
        for module in (*layers_of(encoder.backbone), self._root):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
        super().__init__(modules, optim, collectives)

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a function of inputs gives, with the weights gathered while it runs."""
        return self._root(function, *inputs)

    @contextmanager
    def gradient_pass(self) -> Iterator[Backward]:
        """Run a step's backward passes inside; the last reduces the sum of their gradients.

        So that reduction is part of the phase `replay`, not of `sync`.
        """
        with (
            missing_gradients_are_zeros(self.parameters),
            one_reduction(self.whole_parameters, self.collectives),
        ):
            yield self._backward

    def _backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool
    ) -> None:
        assert isinstance(self._root, FSDPModule)
        # One graph after another, for a unit would reduce after each graph of a common pass.
        for number, (output, gradient) in enumerate(zip(outputs, gradients, strict=True), start=1):
            reduces = last and number == len(outputs)
            self._root.set_requires_gradient_sync(reduces)
            self._root.set_is_last_backward(reduces)
            output.backward(gradient)

    @contextmanager
    def whole(self) -> Iterator[Encoder]:
        """Give a copy with the gathered float32 weights, in the memory of the whole model."""
        with filled(self._skeleton, self._whole_tensors()):
            yield self._skeleton

    def _whole_tensors(self) -> dict[str, Tensor]:
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.encoder.state_dict().items()
        }


def skeleton_of(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder whose weights have shapes and no content."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in encoder.parameters()
    }
    memo[id(encoder.tokenizer)] = encoder.tokenizer
    return copy.deepcopy(encoder, memo)


@contextmanager
def filled(skeleton: Encoder, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Give a skeleton weights inside the context."""
    empty = {name: p.detach() for name, p in skeleton.named_parameters(remove_duplicate=False)}
    skeleton.load_state_dict(tensors, assign=True)
    try:
        yield
    finally:
        skeleton.load_state_dict(empty, strict=False, assign=True)
