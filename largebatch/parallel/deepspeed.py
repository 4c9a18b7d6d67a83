"""DeepSpeed's ZeRO, stages 0 to 3: its engine around the encoder, our optimizer and checkpoints.

One reduction a step, whatever the number of chunks. After a plain `engine.backward` per chunk,
stages 1 and 2 hold the last chunk's gradient only, and stage 3 reduces after each. So stage 0 runs
the chunks inside `no_sync` and reduces once behind them, the others inside
`coalesce_grad_reduction`; until then each rank holds the whole gradient of its own chunks.

The engine goes around the encoder alone. The gradients of the other modules count in the norm that
gradients are clipped by, so the engine never clips by its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.errors import UserError
from largebatch.model.compiled import is_compiled
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import one_reduction, start_equal
from largebatch.parallel.deepspeed_build import import_deepspeed
from largebatch.parallel.deepspeed_config import check_wrapper, engine_config
from largebatch.parallel.fsdp import filled, skeleton_of
from largebatch.parallel.modules import (
    Root,
    clip_factor,
    entries_of,
    missing_bytes,
    missing_gradients_are_zeros,
    split_modules,
    trained,
)
from largebatch.parallel.optimizer import MOMENTS, make_optimizer, set_learning_rate
from largebatch.parallel.strategy import Backward
from largebatch.phases import phase


class DeepSpeedModel:
    """The strategy `deepspeed`.

    Args:
        modules: The whole encoder, and what is trained beside it and stays whole on every rank; all
            ranks get rank 0's weights.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
        device: Of this rank.
        config: The stage, and entries of DeepSpeed's config.

    Raises:
        UserError: DeepSpeed can't run here, refuses its config, or is too slow with it.
    """

    can_redo = False

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optim: OptimConfig,
        collectives: Collectives,
        device: torch.device,
        config: StrategyConfig,
    ) -> None:
        encoder, self._others = split_modules(modules)
        if config.zero_stage == 3 and is_compiled(encoder):
            # It would work, but dynamo traces ZeRO-3's hooks anew all the time: minutes per step.
            raise UserError(
                "backbone.compile=true can't be used with strategy.zero_stage=3; use "
                "backbone.compile=false, strategy.zero_stage=2 or strategy=fsdp"
            )
        start_equal(modules.values(), collectives)
        self.modules = modules
        self.collectives = collectives
        self.stage = config.zero_stage
        self.equal_chunks = self.stage == 3
        self.encoder_parameters = trained(encoder)
        self.whole_parameters = trained(*self._others.values())
        self.num_parameters = sum(
            p.numel() for p in (*self.encoder_parameters, *self.whole_parameters)
        )
        self._module: Encoder = encoder
        self._skeleton = skeleton_of(encoder)
        self._client = make_optimizer([encoder], optim)
        self._own_optimizer = (
            make_optimizer(self._others.values(), optim) if self.whole_parameters else None
        )
        self._num_steps = 0
        deepspeed = import_deepspeed(device, collectives.world)
        try:
            self.engine: Any = deepspeed.initialize(
                model=Root(encoder),
                optimizer=self._client,
                config=engine_config(config),
                dist_init_required=False,
            )[0]
        except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"strategy=deepspeed, strategy.zero_stage={self.stage}: DeepSpeed refuses "
                f"strategy.config={config.config}: {' '.join(str(error).split())[:400]}"
            ) from error
        self._utils = deepspeed.utils
        self._gathered = deepspeed.zero.GatheredParameters
        check_wrapper(self.engine.optimizer, self.stage)
        self._make_moments()

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a function of inputs gives, run by the engine."""
        return self.engine(function, *inputs)

    @contextmanager
    def gradient_pass(self) -> Iterator[Backward]:
        """Run a step's backward passes inside; leaving averages their gradients, once."""
        with one_reduction(self.whole_parameters, self.collectives):
            if self.stage == 0:
                with self.engine.no_sync(), missing_gradients_are_zeros(self.encoder_parameters):
                    yield self._backward
                with phase("sync"):
                    self.engine.allreduce_gradients()
            elif self.stage == 3:
                with self._one_flush():
                    yield self._backward
            else:
                # A rank without a chunk would leave its share of the reduction out.
                with self._one_flush(), missing_gradients_are_zeros(self.encoder_parameters):
                    yield self._backward

    @contextmanager
    def _one_flush(self) -> Iterator[None]:
        flushes = [f"_flush_coalesced_reduction_{stages}" for stages in ("zero12", "zero3")]
        try:
            with ExitStack() as stack:
                stack.enter_context(self.engine.coalesce_grad_reduction())
                try:
                    yield
                except BaseException:
                    # The context would reduce on the way out, and wait for ranks that don't.
                    for name in flushes:
                        setattr(self.engine, name, lambda _: None)
                    raise
                with phase("sync"):
                    stack.close()
        finally:
            for name in flushes:
                self.engine.__dict__.pop(name, None)

    def _backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        last: bool,  # noqa: ARG002
    ) -> None:
        for output, gradient in zip(outputs, gradients, strict=True):
            self.engine.backward((output * gradient).sum())

    def missing_bytes(self) -> int:
        """Return what gradients and AdamW have still to take of this rank's device, at most."""
        missing = missing_bytes(
            self.whole_parameters, [self._own_optimizer] if self._own_optimizer else []
        )
        if self.stage == 0:
            return missing + missing_bytes(self.encoder_parameters, [self._client])
        # The moments are there already (see _make_moments). At stage 3 `numel` is a shard's or 0.
        return missing + sum(
            getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.encoder_parameters
        )

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them) and return their norm before."""
        whole_gradients = [p.grad for p in self.whole_parameters if p.grad is not None]
        of_encoder = self._encoder_gradient_norm()
        of_others = nn.utils.get_total_norm(whole_gradients)
        norm = torch.hypot(of_encoder, of_others.to(of_encoder))
        if max_norm > 0:
            factor = clip_factor(norm, max_norm)
            for gradient in whole_gradients:
                gradient.mul_(factor)
            if self.stage == 0:
                for parameter in self.encoder_parameters:
                    assert parameter.grad is not None
                    parameter.grad.mul_(factor)
            else:
                # In its step it divides by (its own norm + 1e-6) / clip_grad where that is above 1.
                self.engine.optimizer.clip_grad = float((of_encoder + 1e-6) * factor)
        return norm

    def _encoder_gradient_norm(self) -> Tensor:
        if self.stage == 0:
            return nn.utils.get_total_norm(
                [p.grad for p in self.encoder_parameters if p.grad is not None]
            )
        if self.stage == 3:
            return self._norm_of_shards(self._utils.safe_get_local_grad)
        norm = torch.as_tensor(
            self.engine.optimizer.scaled_global_norm(), device=self._module.device
        )
        return norm.where(norm >= 0, torch.nan)  # it says -1 where the norm is not finite

    def step(self, learning_rate: float) -> None:
        """Move the weights by AdamW."""
        set_learning_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        if self._own_optimizer is not None:
            set_learning_rate(self._own_optimizer, learning_rate)
            self._own_optimizer.step()
        self._num_steps += 1

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.engine.optimizer.zero_grad()
        for parameter in self.whole_parameters:
            parameter.grad = None

    def parameter_norm(self) -> Tensor:
        """Return the norm of all weights, a scalar."""
        of_others = nn.utils.get_total_norm([p.detach() for p in self.whole_parameters])
        if self.stage == 3:
            of_encoder = self._norm_of_shards(lambda p: p.ds_tensor)
        else:
            of_encoder = nn.utils.get_total_norm([p.detach() for p in self.encoder_parameters])
        return torch.hypot(of_encoder, of_others.to(of_encoder))

    @contextmanager
    def whole(self) -> Iterator[Encoder]:
        """Give the encoder, at stage 3 a copy with the gathered weights."""
        if self.stage < 3 and self._weights_are_float32():
            yield self._module
            return
        gathered = {name: self._whole(tensor) for name, tensor in self._encoder_tensors()}
        with filled(self._skeleton, gathered):
            yield self._skeleton

    def shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights."""
        return {
            **{f"encoder.{n}": getattr(t, "ds_shape", t.shape) for n, t in self._encoder_tensors()},
            **{name: tensor.shape for name, tensor in self._other_tensors()},
        }

    def trained_shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of the weights that the optimizer moves."""
        named = [
            *((f"encoder.{name}", p) for name, p in self._module.named_parameters()),
            *self._other_parameters(),
        ]
        return {name: getattr(p, "ds_shape", p.shape) for name, p in named if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights by name on rank 0, nothing elsewhere."""
        found: dict[str, Tensor] = {}
        for name, tensor in self._encoder_tensors():
            self._keep_on_main(found, f"encoder.{name}", self._whole(tensor))
        for name, tensor in self._other_tensors():
            self._keep_on_main(found, name, tensor)
        return found

    @torch.no_grad()
    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite all weights; every rank gives the whole tensors."""
        for name, tensor in self._other_tensors():
            tensor.copy_(tensors[name])
        for name, tensor in self._encoder_tensors():
            value = tensors[f"encoder.{name}"].to(self._module.device)
            if hasattr(tensor, "ds_id"):
                with self._gathered([tensor], modifier_rank=0):
                    if self.collectives.world.is_main:
                        tensor.data.copy_(value)
            else:
                tensor.data.copy_(value)
            if self.stage > 0 and tensor.requires_grad:  # the optimizer's own copy
                self._utils.safe_set_full_fp32_param(tensor, value.float())

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return exp_avg.NAME, exp_avg_sq.NAME and step.NAME on rank 0, nothing elsewhere."""
        found: dict[str, Tensor] = {}
        if self._num_steps == 0:
            return found
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                continue
            for key in MOMENTS:
                if self.stage == 0:
                    value = self._client.state[parameter][key]
                else:
                    value = self._utils.safe_get_full_optimizer_state(parameter, key)
                self._keep_on_main(found, f"{key}.encoder.{name}", value)
            self._keep_on_main(found, f"step.encoder.{name}", torch.tensor(float(self._num_steps)))
        if self._own_optimizer is not None:
            for name, parameter in self._other_parameters():
                for key, value in self._own_optimizer.state[parameter].items():
                    self._keep_on_main(found, f"{key}.{name}", value)
        return found

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's state; every rank gives the whole tensors."""
        steps = [int(tensor) for name, tensor in tensors.items() if name.startswith("step.")]
        self._num_steps = max(steps, default=0)
        if self._own_optimizer is not None:
            for name, parameter in self._other_parameters():
                self._own_optimizer.state[parameter] = entries_of(tensors, name, parameter)
        for flat in self._flat_masters():
            self._client.state[flat]["step"].fill_(self._num_steps)
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 0:
                self._client.state[parameter] = entries_of(tensors, f"encoder.{name}", parameter)
                continue
            for key in MOMENTS:
                value = tensors[f"{key}.encoder.{name}"].to(self._module.device)
                self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _make_moments(self) -> None:
        """Make AdamW's state, which it would make in its first step.

        DeepSpeed 0.19.8 links it to the weights once, after the first group's first step, and never
        finds what the other groups get.
        """
        for flat in self._flat_masters():
            state = self._client.state[flat]
            state["step"] = torch.zeros((), device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> Sequence[Tensor]:
        """Return this rank's shares of the float32 weights, which AdamW moves."""
        match self.stage:
            case 0:
                return []
            case 3:
                return self.engine.optimizer.fp32_partitioned_groups_flat  # type: ignore[no-any-return]
            case _:
                return self.engine.optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _encoder_tensors(self) -> Iterator[tuple[str, Any]]:
        yield from self._module.state_dict(keep_vars=True).items()

    def _other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._others.items():
            for name, tensor in module.state_dict().items():
                yield f"{prefix}.{name}", tensor

    def _other_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self._others.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{prefix}.{name}", parameter

    def _whole(self, tensor: Any) -> Tensor:
        """Return a weight or buffer in float32 as the optimizer has it; called by all ranks."""
        if self.stage > 0 and tensor.requires_grad:
            return self._utils.safe_get_full_fp32_param(tensor)  # type: ignore[no-any-return]
        if hasattr(tensor, "ds_id"):
            with self._gathered([tensor]):
                return tensor.detach().clone()  # type: ignore[no-any-return]
        return tensor.detach()  # type: ignore[no-any-return]

    def _keep_on_main(self, found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.collectives.world.is_main:
            found[name] = tensor.detach().cpu()

    def _norm_of_shards(self, shard_of: Callable[[Any], Tensor]) -> Tensor:
        rank, shards = self.collectives.world.rank, []
        for parameter in self.encoder_parameters:
            shard = shard_of(parameter).detach().float().flatten()
            # Shards are equally long, so the last ones reach beyond the weight: that part holds
            # arbitrary numbers.
            left = parameter.ds_numel - rank * shard.numel()  # type: ignore[attr-defined]
            shards.append(shard[: max(left, 0)])
        return self.collectives.sum(nn.utils.get_total_norm(shards).square()).sqrt()

    def _weights_are_float32(self) -> bool:
        return all(p.dtype == torch.float32 for p in self.encoder_parameters)
