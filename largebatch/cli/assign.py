"""Sets options in a composed config, once an override is known to name one.

- A group of options takes those that are given: `optim={lr: 1e-4}` leaves the others as they are.
- A mapping of free entries is set whole: `eval.dev={x: beir}` replaces what was there;
  `+eval.dev={x: beir}`, or with ++, adds to it; `~eval.dev` empties it, and `~eval.dev.x` takes
  one entry out.
- A list takes a list, or one element: `shards=folder` is `shards=[folder]`.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, ValidationError

from largebatch.cli.options import describe_value, takes_text, unknown_option
from largebatch.cli.quoting import as_typed
from largebatch.errors import UserError

_REFERENCE = re.compile(r"\$\{([^{}:]+)\}")
"""A value that stands for another option, such as ${data.sources.a.urls}."""


def assign(config: DictConfig, config_class: type[Any], override: Override) -> None:
    """Set or remove, in place, what an override says; `config` must not be a struct.

    Raises:
        UserError: The value doesn't fit; names the very option or entry.
    """
    *parents, name = override.key_or_group.split(".")
    node: Any = config
    annotation: Any = config_class
    for depth, part in enumerate(parents):
        inner = _type_inside(annotation, part)
        _make_room(node, part, inner, ".".join(parents[: depth + 1]))
        node, annotation = node[part], inner
    if override.type is OverrideType.DEL:
        _remove(node, name, annotation, override)
    else:
        inner = _type_inside(annotation, name)
        _Value(config, config_class, override).put(
            node, name, inner, override.value(), override.key_or_group
        )


def _type_inside(annotation: Any, name: str) -> Any:
    """Return the type of the option or entry `name` of a type."""
    if annotation is Any:
        return Any
    if dataclasses.is_dataclass(annotation):
        return typing.get_type_hints(annotation)[name]
    return typing.get_args(annotation)[1]


def _make_room(node: Any, name: str | int, annotation: Any, key: str) -> None:
    """Make an entry that something is set in, unless it is there; of a reference, a copy.

    Raises:
        UserError: Nothing can be set in what is there.
    """
    present = node.get(name)
    if isinstance(present, ListConfig):
        raise UserError(f"{key} is a list, so set it whole: {key}=[...]")
    if isinstance(present, DictConfig):
        if OmegaConf.is_interpolation(node, name):
            node[name] = present  # assigning copies: what it refers to stays as it is
    elif annotation is Any:
        node[name] = {}
    elif present is None and dataclasses.is_dataclass(annotation):
        node[name] = OmegaConf.structured(annotation)
    else:
        raise _wrong(annotation, present, key)


def _remove(node: Any, name: str, annotation: Any, override: Override) -> None:
    key = override.key_or_group
    if "=" in str(override.input_line):
        raise UserError(f"{override.input_line!r} removes, so it takes no value: ~{key}")
    if dataclasses.is_dataclass(annotation):
        node[name] = {}
    elif name in node:
        del node[name]
    else:
        there = f"it has {', '.join(map(str, node))}" if node else "it is empty"
        raise UserError(f"~{key}: {key.removesuffix(f'.{name}')} has no entry {name!r}; {there}")


class _Value:
    """The value of one override, and what it is put into."""

    def __init__(self, config: DictConfig, config_class: type[Any], override: Override) -> None:
        self._config_class = config_class
        self._adds = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        self._config = config
        self._whole = override.value()
        self._text = str(override.input_line).partition("=")[2].strip()

    def put(self, node: Any, name: str | int, annotation: Any, value: Any, key: str) -> None:
        """Set an entry; `key` is what messages call it."""
        if self._stands_for(value, annotation):
            with self._told(annotation, value, key):
                node[name] = value
        elif dataclasses.is_dataclass(annotation):
            self._put_options(node, name, annotation, value, key)
        elif typing.get_origin(annotation) is dict:
            self._put_mapping(node, name, annotation, value, key)
        elif typing.get_origin(annotation) is list:
            self._put_list(node, name, annotation, value, key)
        elif annotation is Any and self._adds and isinstance(value, dict):
            node[name] = OmegaConf.merge(node.get(name) or {}, value)
        else:
            with self._told(annotation, value, key):
                node[name] = self._leaf(annotation, value, key)

    def _put_options(
        self, node: Any, name: str | int, annotation: Any, value: Any, key: str
    ) -> None:
        if not isinstance(value, dict):
            raise _wrong(annotation, value, key)
        if isinstance(node, DictConfig):
            _make_room(node, name, annotation, key)
        hints = typing.get_type_hints(annotation)
        for option, inner in value.items():
            if option not in hints:
                raise unknown_option(self._config_class, f"{key}.{option}", key, list(hints))
            self.put(node[name], option, hints[option], inner, f"{key}.{option}")

    def _put_mapping(
        self, node: Any, name: str | int, annotation: Any, value: Any, key: str
    ) -> None:
        if not isinstance(value, dict):
            raise UserError(
                f"{key}={show_value(value)} must be {describe_value(annotation)}"
                + _as_entry(annotation, value, key)
            )
        if self._adds:
            _make_room(node, name, annotation, key)
        else:
            node[name] = {}
        cure = f"for an entry of that name, write {key}.NAME=..."
        for entry, inner in value.items():
            word = entry if isinstance(entry, str) else self._as_written(entry, key, cure)
            self.put(node[name], word, typing.get_args(annotation)[1], inner, f"{key}.{word}")

    def _put_list(self, node: Any, name: str | int, annotation: Any, value: Any, key: str) -> None:
        if value is None or value == "":
            raise _wrong(annotation, value, key)
        (of_element,) = typing.get_args(annotation)
        if isinstance(value, dict) and not dataclasses.is_dataclass(of_element):
            raise _wrong(annotation, value, key)
        node[name] = []
        for number, element in enumerate(value if isinstance(value, list) else [value]):
            of_key = f"{key}[{number}]" if isinstance(value, list) else key
            if dataclasses.is_dataclass(of_element):
                node[name].append(OmegaConf.structured(of_element))
                self._put_options(node[name], number, of_element, element, of_key)
            else:
                with self._told(of_element, element, of_key):
                    node[name].append(self._leaf(of_element, element, of_key))

    def _stands_for(self, value: Any, annotation: Any) -> bool:
        """Whether a value refers to another option, which for a list must be one too."""
        if not isinstance(value, str) or not (found := _REFERENCE.fullmatch(value)):
            return False
        if typing.get_origin(annotation) is not list:
            return True
        return OmegaConf.is_list(OmegaConf.select(self._config, found[1]))

    def _leaf(self, annotation: Any, value: Any, key: str) -> Any:
        is_word = isinstance(value, bool | int | float)
        return (
            self._as_written(value, key, "put it in quotes")
            if is_word and takes_text(annotation)
            else value
        )

    def _as_written(self, value: Any, key: str, cure: str) -> str:
        """Return as a text what was read as a number, true, false or null."""
        if not isinstance(self._whole, dict | list):
            return self._text
        text = show_value(value)
        if text not in self._text.lower():
            raise UserError(f"{key}: {text} was read as a number; {cure}")
        return text

    @contextmanager
    def _told(self, annotation: Any, value: Any, key: str) -> Iterator[None]:
        try:
            yield
        except ValidationError as error:
            raise _wrong(annotation, value, key) from error
        except GrammarParseError as error:
            raise UserError(
                f"{key}={show_value(value)}: ${{ begins a reference, such as ${{name}}; write "
                "\\${ for a literal one"
            ) from error


def show_value(value: Any) -> str:
    """Write a value as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, dict):
        entries = (f"{show_value(name)}: {show_value(inner)}" for name, inner in value.items())
        return "{" + ", ".join(entries) + "}"
    return str(value)


def _wrong(annotation: Any, value: Any, key: str) -> UserError:
    return UserError(f"{key}={show_value(value)} must be {describe_value(annotation)}")


def _as_entry(annotation: Any, value: Any, key: str) -> str:
    """Say how to write a mapping's value where the braces, or the entry's name, were forgotten."""
    if not isinstance(value, str) or not value:
        return ""
    if ": " in value:
        return f"; write {as_typed(f'{key}={{{value}}}')}"
    inner = typing.get_args(annotation)[1]
    if dataclasses.is_dataclass(inner):
        return f"; give the entry a name: {key}.NAME.{dataclasses.fields(inner)[0].name}={value}"
    return f"; give the entry a name: {key}.NAME={value}"
