"""Parts of a backbone that are left as they are: chosen by kind or by name, and not trained.

A frozen weight has no gradient and no optimizer state; it is saved and exported as it came. Where
the embeddings and the first layers are frozen, no graph of them is held and nothing is
back-propagated through them.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from largebatch.config import suggest
from largebatch.errors import UserError
from largebatch.model.compiled import layers_of

POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""What architectures call their table of positions."""
LAYERS = "layers:"
"""Begins the entry that freezes so many first layers."""


def freeze(backbone: nn.Module, entries: Sequence[str]) -> None:
    """Freeze what entries name, in place.

    Args:
        backbone: A transformers model.
        entries: positions (the table of positions, as E5 freezes it), embeddings (all that comes
            before the layers), layers:N (the first N layers), or a name of weights or modules, with
            wildcards.

    Raises:
        UserError: An entry names nothing that is trained, or nothing is left to train.
    """
    trained = {name for name, one in _named(backbone) if one.requires_grad}
    chosen = set()
    for entry in entries:
        found = set(_chosen(backbone, entry)) & trained
        if not found:
            raise UserError(f"backbone.freeze: {entry!r} {_why_nothing(backbone, entry, trained)}")
        chosen |= found
    for name, one in _named(backbone):
        if name in chosen:
            one.requires_grad_(False)
    if not any(one.requires_grad for one in backbone.parameters()):
        raise UserError(
            f"backbone.freeze={list(entries)} leaves nothing of the backbone to train; leave out "
            "an entry"
        )


def is_embedding(name: str) -> bool:
    """Return whether a weight outside the layers is one of what comes before them."""
    return any("embed" in part or part in ("wte", "wpe") for part in name.split("."))


def in_layers(backbone: nn.Module) -> dict[int, int]:
    """Return the number of the layer, from 0, that each weight of the layers is in, by its id."""
    return {
        id(weight): number
        for number, layer in enumerate(layers_of(backbone))
        for weight in layer.parameters()
    }


def _named(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return backbone.named_parameters(remove_duplicate=False)


def _chosen(backbone: nn.Module, entry: str) -> Iterator[str]:
    layers = in_layers(backbone)
    for name, weight in _named(backbone):
        if entry == "positions":
            is_chosen = any(part in POSITIONS for part in name.split("."))
        elif entry == "embeddings":
            is_chosen = id(weight) not in layers and is_embedding(name)
        elif entry.startswith(LAYERS):
            is_chosen = layers.get(id(weight), len(layers)) < _num_layers(backbone, entry)
        else:
            is_chosen = fnmatchcase(name, entry) or fnmatchcase(name, f"{entry}.*")
        if is_chosen:
            yield name


def _num_layers(backbone: nn.Module, entry: str) -> int:
    number, there = int(entry.removeprefix(LAYERS)), len(layers_of(backbone))
    if number > there:
        raise UserError(
            f"backbone.freeze: {entry!r} is more than the {there} layers that there are"
        )
    return number


def _why_nothing(backbone: nn.Module, entry: str, trained: set[str]) -> str:
    kind = type(backbone).__name__
    if entry == "positions":
        return f"is nothing that {kind} has: it learns no table of positions; leave it out"
    modules = {name.rpartition(".")[0] for name in trained}
    near = suggest(entry, sorted(trained | modules | {"positions", "embeddings"}))
    shown = ", ".join(sorted(trained)[:3])
    return (
        f"matches no trained weight of {kind}{near}; name positions, embeddings, layers:N, or "
        f"weights such as {shown}"
    )
