"""Sets options in a composed config, once an override is known to name one.

- A group of options takes those that are given: `optim={lr: 1e-4}` leaves the others as they are.
- A mapping of free entries is set whole: `eval.dev={x: beir}` replaces what was there;
  `+eval.dev={x: beir}`, or with ++, adds to it; `~eval.dev` empties it, and `~eval.dev.x` takes
  one entry out.
- A list takes a list, or one element: `shards=folder` is `shards=[folder]`.
"""

import dataclasses
import typing
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType

from largebatch.cli.options import type_inside
from largebatch.cli.values import Fitting
from largebatch.errors import UserError


def assign(config: dict[str, Any], config_class: type[Any], override: Override) -> None:
    """Set or remove, in place, what an override says.

    Raises:
        UserError: The value doesn't fit; names the very option or entry.
    """
    key = override.key_or_group
    *parents, name = key.split(".")
    written = str(override.input_line).partition("=")[2].strip()
    adds = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
    fitting = Fitting(config_class, config, written=written, adds=adds)
    node: dict[str, Any] = config
    annotation: Any = config_class
    for depth, part in enumerate(parents, start=1):
        annotation = type_inside(annotation, part)
        node[part] = fitting.open(node.get(part), annotation, ".".join(parents[:depth]))
        node = node[part]
    inside = type_inside(annotation, name)
    if override.type is OverrideType.DEL:
        _remove(node, name, inside, override, is_entry=not dataclasses.is_dataclass(annotation))
    else:
        node[name] = fitting.fit(override.value(), inside, key, node.get(name))


def _remove(
    node: dict[str, Any], name: str, annotation: Any, override: Override, *, is_entry: bool
) -> None:
    key = override.key_or_group
    if not is_entry and typing.get_origin(annotation) is not dict:
        unset = f"; set {key}=null" if type(None) in typing.get_args(annotation) else ""
        raise UserError(f"{override.input_line}: only entries of a mapping can be removed{unset}")
    if "=" in str(override.input_line):
        raise UserError(f"{override.input_line!r} removes, so it takes no value: ~{key}")
    if not is_entry:
        node[name] = {}
    elif name in node:
        del node[name]
    else:
        there = f"it has {', '.join(map(str, node))}" if node else "it is empty"
        raise UserError(f"~{key}: {key.removesuffix(f'.{name}')} has no entry {name!r}; {there}")
