"""What a chunk's forward pass keeps for its backward pass: a scale from nothing to everything.

| level | what is kept | what is computed again | units |
|---|---|---|---|
| none | nothing | the forward pass | 4 |
| layers | each layer's products that take in more than they give out | the rest | about 3.67 |
| products | outputs of all matrix products and of attention | elementwise operations | 3 |
| all | all that autograd saves | nothing | 3 |

A unit is the work of a forward pass; a backward pass is two. A product saves as many
multiplications for each number kept as it takes in: most in the second product of a feed-forward.
`layers` and `products` run the whole encoder under torch's checkpointing, which replays the random
state, so that dropout is exact; what is kept is not computed again. They see single operations,
which neither compiled layers show nor layers that are checkpointed one by one.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from largebatch.batch import Chunk
from largebatch.errors import UserError
from largebatch.model.compiled import has_checkpointed_layers, is_compiled
from largebatch.out_of_memory import seconds_of

LEVELS = ("none", "layers", "products", "all")
"""From the least memory to the most."""
PARTIAL_LEVELS = ("layers", "products")

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
_ATTENTIONS = {
    # Attention, and which argument is its share of dropout.
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    _aten._scaled_dot_product_flash_attention.default: 3,
    _aten._scaled_dot_product_efficient_attention.default: 5,
    _aten._scaled_dot_product_cudnn_attention.default: 5,
}
_VARLEN_ATTENTION = "torch_attn::_varlen_attn"
"""Registered only when torch.nn.attention.varlen is imported; it has no dropout."""


class LevelCost(NamedTuple):
    """What a level costs, as measured on a chunk."""

    bytes_per_token: float
    """Memory that is held from the forward to the backward pass."""
    recomputed: float
    """Share of the forward pass's multiplications that the backward pass repeats."""
    seconds_per_token: float = 0.0
    """Of all passes of a step, forward and backward. 0: not measured."""


def embed_keeping(forward: Callable[[Chunk], Tensor], chunk: Chunk, level: str) -> Tensor:
    """Return the embeddings of a chunk, with a graph unless the level is none.

    Args:
        forward: The encoder, or what a strategy makes of it.
        chunk: The chunk.
        level: One of LEVELS.

    Raises:
        UserError: The level keeps parts of a graph, which this encoder can't.
    """
    if level == "none":
        with torch.no_grad():
            return forward(chunk)
    if level == "all":
        return forward(chunk)
    check_level(forward, level)
    embeddings: Tensor = checkpoint(
        forward, chunk, use_reentrant=False, context_fn=partial(_keep_and_reuse, level)
    )
    return embeddings


def check_level(forward: Callable[[Chunk], Tensor], level: str) -> None:
    """Raise a UserError if the encoder's chunks can't keep what `keep=level` says."""
    if level in PARTIAL_LEVELS and (option := _why_all_or_nothing(forward)) is not None:
        raise UserError(
            f"keep={level} can't be used with {option}=true, which leaves nothing between none and "
            f"all: use keep=none, all or auto, or {option}=false"
        )


def _why_all_or_nothing(forward: Callable[[Chunk], Tensor]) -> str | None:
    """Return the option that keeps a chunk from keeping parts of its graph, None without one."""
    if not isinstance(forward, nn.Module):
        return None
    if is_compiled(forward):
        return "backbone.compile"
    return "backbone.checkpoint_layers" if has_checkpointed_layers(forward) else None


def measure_levels(
    forward: Callable[[Chunk], Tensor], chunk: Chunk, parameters: Sequence[nn.Parameter]
) -> dict[str, LevelCost]:
    """Return what each level costs, from one forward pass whose graph is thrown away.

    Args:
        forward: The encoder, or what a strategy makes of it.
        chunk: Some chunk, a long one rather than a short one.
        parameters: The encoder's; they are held anyway, and don't count.

    Where there is nothing between none and all, the levels between them cost what all costs.
    """
    counter = _Counter()
    has_parts = _why_all_or_nothing(forward) is None
    storages: dict[int, torch.UntypedStorage] = {}
    whole = [p for p in parameters if not hasattr(p, "to_local")]
    own = {p.untyped_storage().data_ptr() for p in whole}

    def count(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        # A weight that was gathered from its shards is none of `parameters`, and no chunk's own.
        if not isinstance(source, nn.Parameter) and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    # The graph holds what was counted until the end: no address is used twice.
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        counter if has_parts else nullcontext(),
    ):
        embeddings = forward(chunk)
    tokens = chunk.num_tokens
    held = sum(storage.nbytes() for storage in storages.values())
    del embeddings
    costs = dict.fromkeys(LEVELS, LevelCost(held / tokens, 0.0)) | {"none": LevelCost(0.0, 1.0)}
    for level in PARTIAL_LEVELS if has_parts else ():
        saved = counter.flops[level] / max(counter.flops["all"], 1)
        costs[level] = LevelCost(counter.bytes[level] / tokens, 1.0 - saved)
    return costs


def time_levels(
    forward: Callable[[Chunk], Tensor],
    chunk: Chunk,
    parameters: Sequence[nn.Parameter],
    *,
    tries: int = 3,
) -> dict[str, float]:
    """Return the seconds that a chunk's forward and backward passes take at each level.

    Args:
        forward: The encoder; `.grad` and weights stay as they are.
        chunk: Some chunk.
        parameters: The encoder's.
        tries: Passes at each level, of which the fastest counts. Levels take turns.

    Infinity where memory runs out, or where the encoder can't keep parts of a graph.
    """
    trained = [p for p in parameters if p.requires_grad]
    has_parts = _why_all_or_nothing(forward) is None
    fastest = dict.fromkeys(LEVELS, math.inf)

    def passes(level: str) -> None:
        embeddings = embed_keeping(forward, chunk, level)
        if level == "none":
            embeddings = forward(chunk)
        torch.autograd.grad(embeddings, trained, torch.ones_like(embeddings), allow_unused=True)

    for _ in range(tries):
        for level in LEVELS if has_parts else ("none", "all"):
            seconds = seconds_of(partial(passes, level), chunk.input_ids.device)
            fastest[level] = min(fastest[level], seconds)
    return fastest


def _keep_and_reuse(level: str) -> tuple["_Keep", "_Reuse"]:
    """Return the contexts of a forward pass that keeps, and of its repetition, which reuses.

    torch's own create_selective_checkpoint_contexts expects every operation to occur again, but
    under ZeRO-3 the repetition gathers weights differently. Here only what is kept must.
    """
    kept: deque[_Kept] = deque()
    return _Keep(level, kept), _Reuse(level, kept)


class _Kept(NamedTuple):
    func: Any
    outputs: Any
    """A tensor, or a tuple with tensors in it."""


class _Selecting(TorchDispatchMode):
    """Runs all operations but those that a level keeps, which `_select` stands for."""

    def __init__(self, level: str, kept: deque[_Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level, self.kept = level, kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_kept(self.level, func, args, kwargs):
            return self._select(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _select(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Keep(_Selecting):
    def __init__(self, level: str, kept: deque[_Kept]) -> None:
        super().__init__(level, kept)
        self._places: dict[int, int] = {}  # in `kept`, by the address of each storage

    def _select(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        # Without what autograd will hang on it, which would hold the graph.
        self.kept.append(_Kept(func, tree_map_only(Tensor, Tensor.detach, out)))
        self._note(len(self.kept) - 1)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Copy before write: under ZeRO-3 a linear layer adds its bias to the product in place, and
        # will add it again to what is kept.
        for tensor in _written(func, args, kwargs):
            place = self._places.pop(_address(tensor), None)
            if place is not None:
                copies = tree_map_only(Tensor, torch.clone, self.kept[place].outputs)
                self.kept[place] = self.kept[place]._replace(outputs=copies)
                self._note(place)
        return func(*args, **kwargs)

    def _note(self, place: int) -> None:
        for leaf in tree_leaves(self.kept[place].outputs):
            if isinstance(leaf, Tensor):
                self._places[_address(leaf)] = place


class _Reuse(_Selecting):
    def _select(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        kept = self.kept.popleft()
        assert kept.func is func, f"{func} is computed again where {kept.func} was kept"
        return kept.outputs


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation overwrites."""
    if not func._schema.is_mutable:
        return []
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
    written = [value for one, value in given if one.alias_info and one.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_kept(level: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in _PRODUCTS:
        if level == "products":
            return True
        left, right = args[-2:]
        return bool(left.ndim == 2 and left.shape[1] > right.shape[1])
    if level != "products":
        return False
    if func in _ATTENTIONS:
        # Attention that draws dropout masks is computed again, or else the generator would not
        # move on as it did, and what is drawn after it would be another mask.
        place = _ATTENTIONS[func]
        dropout = kwargs.get("dropout_p", args[place] if len(args) > place else 0.0)
        return not dropout
    return bool(func.name().startswith(_VARLEN_ATTENTION))


class _Counter(TorchDispatchMode):
    """Counts the multiplications of products and attention, and the bytes of their outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = dict.fromkeys(LEVELS, 0)
        self.bytes = dict.fromkeys(LEVELS, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if flops := _multiplications(func, args):
            self.flops["all"] += flops
            tensors = [
                t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)
            ]
            for level in PARTIAL_LEVELS:
                if _is_kept(level, func, args, kwargs):
                    self.flops[level] += flops
                    self.bytes[level] += sum(t.nbytes for t in tensors)
        return out


def _multiplications(func: Any, args: tuple[Any, ...]) -> int:
    if func in _PRODUCTS:
        left, right = args[-2:]
        return int(left.numel() * right.shape[-1])
    if func in _ATTENTIONS:
        query, key = args[:2]
        return int(2 * query.numel() * key.shape[-2])
    if func.name().startswith(_VARLEN_ATTENTION):
        query, boundaries = args[0], args[3]
        return int(2 * query.numel() * len(query) / (len(boundaries) - 1))
    return 0
