"""What changes how the layers of a backbone run: torch.compile, and activation checkpointing.

Each layer is compiled by itself, in place: layers share their code, so one graph serves all of
them, which is compiled many times as fast as that of the whole backbone, and names of weights,
export, checkpoints and fully_shard never see it. Rows and length are symbols in the graph.
"""

import os
import platform
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import Chunk
from largebatch.errors import UserError

BACKEND = "inductor"
"""What torch.compile hands its graphs to."""


def compile_layers(backbone: nn.Module) -> None:
    """Compile the layers of a backbone, at their first call.

    Raises:
        UserError: There is no C++ compiler, or the backbone has no list of layers.
    """
    layers = layers_of(backbone)
    if not layers:
        kind = type(backbone).__name__
        raise UserError(
            f"backbone.compile: {kind} has no list of layers; use backbone.compile=false"
        )
    if BACKEND == "inductor":
        check_compiler()
        # Inductor has random numbers of its own, numbered by graph, and the first pass and the
        # replay of a chunk are two graphs. torch's depend on the order of the draws alone: the
        # masks are those that are drawn without compiling.
        options: dict[str, Any] = {"options": {"fallback_random": True}}
    else:
        options = {}
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True, **options)


def check_compiler() -> None:
    """Raise a UserError where torch.compile would not find its C++ compiler."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"backbone.compile needs a C++ compiler, and {compiler!r} is not there: install g++ "
            "(Debian, Ubuntu: apt-get install g++), name another in CXX, or use "
            "backbone.compile=false"
        )


def checkpoint_layers(backbone: nn.Module) -> None:
    """Make each layer keep its input only, and run again in the backward pass.

    The random state is replayed, so that dropout is exact; without a graph nothing runs twice.

    Raises:
        UserError: The backbone can't do it.
    """
    model: Any = backbone
    if not getattr(model, "supports_gradient_checkpointing", False):
        kind = type(backbone).__name__
        raise UserError(
            f"backbone.checkpoint_layers: {kind} has no activation checkpointing; use "
            "backbone.checkpoint_layers=false and a smaller tokens_per_chunk"
        )
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name in older versions of transformers, deprecated since
        model.gradient_checkpointing_enable({"use_reentrant": False})


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module, or any module in it, is compiled."""
    return any(one._compiled_call_impl is not None for one in module.modules())


def has_checkpointed_layers(module: nn.Module) -> bool:
    """Return whether layers of a module run again in the backward pass."""
    return any(getattr(one, "gradient_checkpointing", False) is True for one in module.modules())


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers of a backbone: the entries of its outermost module lists."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                search(child)

    search(backbone)
    return found


def plain_shape(chunk: Chunk, *, pad_id: int) -> Chunk:
    """Return a padded chunk with padding around it, in a shape that no graph is special for.

    torch compiles anew for a size of 1 and where two sizes are equal. So there are at least two
    rows and two columns, and not as many rows as columns; the first rows are the chunk's.
    """
    ids_nL, mask_nL = chunk.input_ids, chunk.attention_mask
    n, length = ids_nL.shape
    rows = max(n, 2)
    columns = max(length, 2)
    if rows == columns:
        # Not a column: the model may have no position for it.
        rows += 1
    return Chunk(
        _grown(ids_nL, rows, columns, pad_id), _grown(mask_nL, rows, columns, 0), padded=True
    )


def _grown(tensor_nL: Tensor, rows: int, columns: int, fill: int) -> Tensor:
    n, length = tensor_nL.shape
    grown = F.pad(tensor_nL, (0, columns - length), value=fill)
    if rows > n:
        # Copies of the first text: a row without any token would have no attention to give.
        grown = torch.cat([grown, grown[:1].expand(rows - n, -1)])
    return grown
