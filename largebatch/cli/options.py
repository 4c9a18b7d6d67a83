"""What options there are, read from the dataclasses: lookup by dotted key, types, documentation."""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from largebatch.config.checks import nearest
from largebatch.errors import UserError


class Option(NamedTuple):
    """One leaf of a config class."""

    key: str
    """Dotted, as on the command line."""
    annotation: Any
    """Its type."""
    documentation: str
    """The string under the field, on one line."""


def list_options(config_class: type[Any], prefix: str = "") -> Iterator[Option]:
    """Yield the leaves of a config class, in the order of its fields, plain options first.

    Of a class that extends another one, its own options come before the others.
    """
    hints = typing.get_type_hints(config_class)
    documentation = _field_documentation(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    own = inspect.get_annotations(config_class)
    for name in sorted(names, key=lambda n: (dataclasses.is_dataclass(hints[n]), n not in own)):
        if dataclasses.is_dataclass(hints[name]):
            yield from list_options(hints[name], f"{prefix}{name}.")
        else:
            yield Option(prefix + name, hints[name], documentation.get(name, ""))


def num_own_options(config_class: type[Any]) -> int:
    """Return how many options a class has beyond those of the one that it extends, if it does."""
    extends = any(dataclasses.is_dataclass(parent) for parent in config_class.__bases__)
    return len(inspect.get_annotations(config_class)) if extends else 0


def find_option(config_class: type[Any], key: str, *, groups: Iterable[str] = ()) -> Any:
    """Return the type of what `key` names, or raise UserError with the nearest key that exists.

    `groups` are further names that exist at the top, for the message.
    """
    parts = key.split(".")
    if not all(parts):
        raise UserError(f"{key!r} is not an option: it has an empty part")
    annotation: Any = config_class
    with_dot = ""
    for depth, part in enumerate(parts):
        before = ".".join(parts[:depth])
        if dataclasses.is_dataclass(annotation):
            names = list(typing.get_type_hints(annotation))
            if part not in names:
                names += [group for group in groups if depth == 0 and group not in names]
                raise unknown_option(config_class, key, before, names, hint=with_dot)
        elif typing.get_origin(annotation) is dict:
            with_dot = _with_dot(before, parts[depth:], type_inside(annotation, part))
        elif annotation is not Any:
            raise UserError(
                f"{key} is not an option; {before} is {describe_value(annotation)}, "
                f"so set it whole: {before}=...{with_dot}"
            )
        annotation = type_inside(annotation, part)
    return annotation


def type_inside(annotation: Any, name: str) -> Any:
    """Return the type of the option or entry `name` of a type that has it."""
    if dataclasses.is_dataclass(annotation):
        return typing.get_type_hints(annotation)[name]
    return Any if annotation is Any else typing.get_args(annotation)[1]


def _with_dot(mapping: str, rest: list[str], annotation: Any) -> str:
    """Say how to set an entry whose name has a dot, of which `rest` was made."""
    options = typing.get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
    # The name ends where an option of the entry begins.
    end = next((n for n, part in enumerate(rest) if n > 0 and part in options), len(rest))
    if end == 1 or (options and end == len(rest)):
        return ""
    value = "..."
    for part in reversed(rest[end:]):
        value = f"{{{part}: {value}}}"
    entry = f"{'.'.join(rest[:end])}: {value}"
    return f'; a name with a dot goes into braces: "+{mapping}={{{entry}}}"'


def unknown_option(
    config_class: type[Any], key: str, parent: str, siblings: list[str], *, hint: str = ""
) -> UserError:
    """Return the error for an option that `parent` has not, with the nearest that there is.

    `hint` is said besides.
    """
    prefix = f"{parent}." if parent else ""
    options = [option.key for option in list_options(config_class)]
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(options)}
    last_part = key.rpartition(".")[2]
    near = (
        by_last_part.get(last_part)
        or nearest(key, [prefix + sibling for sibling in siblings])
        or nearest(key, options)
        or by_last_part.get(nearest(last_part, by_last_part) or "")
    )
    there = did_you_mean(near, siblings, parent or "top level", hint=hint)
    return UserError(f"{key} is not an option{there}")


def did_you_mean(near: str | None, allowed: Iterable[str], what: str, *, hint: str = "") -> str:
    """Return the end of a message about a wrong word: the nearest right one, and all of them."""
    asked = "" if near is None else f"; did you mean {near}?"
    return f"{asked}{hint} ({what}: {', '.join(allowed)})"


def describe_value(annotation: Any) -> str:
    """Say in words what values a type allows, to end the sentence "it must be ..."."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        null = ["null"] if type(None) in typing.get_args(annotation) else []
        return " or ".join([*map(describe_value, inner), *null])
    if typing.get_origin(annotation) is list:
        (element,) = typing.get_args(annotation)
        if dataclasses.is_dataclass(element):
            return f"a list, such as [{{{next(iter(typing.get_type_hints(element)))}: ...}}]"
        return f"a list, such as [{'1, 2' if element is int else 'a, b'}]"
    if typing.get_origin(annotation) is dict:
        return "a mapping, such as {name: value}"
    if dataclasses.is_dataclass(annotation):
        return f"a group of options ({', '.join(typing.get_type_hints(annotation))})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        annotation, "a value"
    )


def takes_text(annotation: Any) -> bool:
    """Whether a type is text, or text or null."""
    return annotation is str or annotation == str | None


def name_type(annotation: Any) -> str:
    """Name a type for `--help`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else name_type(a) for a in arguments)
    if origin is list:
        return f"list of {name_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {name_type(arguments[1])}"
    if annotation is Any:
        return "anything"
    if dataclasses.is_dataclass(annotation):
        return "{" + ", ".join(field.name for field in dataclasses.fields(annotation)) + "}"
    return str(annotation.__name__)


def _field_documentation(config_class: type[Any]) -> dict[str, str]:
    """Return the string under each field. Python keeps none at run time, so the source is read."""
    found: dict[str, str] = {}
    for parent in config_class.__bases__:
        if dataclasses.is_dataclass(parent):
            found |= _field_documentation(parent)
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = " ".join(below.value.value.split())
    return found
