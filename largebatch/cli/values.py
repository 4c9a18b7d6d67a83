"""Fits values to the types of options: those of the command line, and those of references."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.cli.options import describe_value, takes_text, unknown_option
from largebatch.cli.quoting import as_typed
from largebatch.errors import UserError


class Fitting:
    """Turns values into what options hold, or says what they must be.

    Args:
        config_class: The options, for messages.
        config: What is set so far.
        written: The value as it was typed, in which references, such as ${name}, are left to be
            fitted once it is known what they stand for. None: there are no references any more.
        adds: Whether mappings are added to, and not replaced.
    """

    def __init__(
        self,
        config_class: type[Any],
        config: Mapping[str, Any],
        *,
        written: str | None = None,
        adds: bool = False,
    ) -> None:
        self._config_class = config_class
        self._config = config
        self._written = written
        self._adds = adds

    def fit(self, value: Any, annotation: Any, key: str, present: Any = None) -> Any:
        """Return a value as plain data that fits.

        Args:
            value: What an option is set to.
            annotation: Type of the option.
            key: What messages call the option.
            present: What is there already; options of a group that are not given stay so.

        Raises:
            UserError: It doesn't fit; names the very option or entry.
        """
        if value is not None:
            annotation = _of_collection(annotation)
        origin = typing.get_origin(annotation)
        if self._written is not None and is_reference(value):
            return value
        if dataclasses.is_dataclass(annotation):
            return self._fit_options(value, annotation, key, present)
        if origin is dict or (annotation is Any and isinstance(value, dict)):
            return self._fit_entries(value, annotation, key, present)
        if origin is list:
            return self._fit_elements(value, annotation, key)
        return value if annotation is Any else self._fit_leaf(value, annotation, key)

    def open(self, present: Any, annotation: Any, key: str) -> dict[str, Any]:
        """Return what is in a group or mapping that something is set in; of a reference, a copy.

        Raises:
            UserError: Nothing can be set in what is there.
        """
        if is_reference(present):
            # A node at the top, since there the reference is written as it is elsewhere.
            present = OmegaConf.create({**self._config, "": present})[""]
            present = OmegaConf.to_container(present) if OmegaConf.is_config(present) else present
        if isinstance(present, list):
            raise UserError(f"{key} is a list, so set it whole: {key}=[...]")
        if isinstance(present, dict):
            return present
        if annotation is not Any and present is not None:
            raise self._wrong(annotation, present, key)
        if not dataclasses.is_dataclass(annotation):
            return {}
        return typing.cast(
            "dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(annotation))
        )

    def _fit_options(self, value: Any, annotation: Any, key: str, present: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(annotation, value, key)
        hints = typing.get_type_hints(annotation)
        options = self.open(present, annotation, key)
        for name, inner in value.items():
            inner_key = f"{key}.{name}" if key else name
            if name not in hints and self._written is None:
                raise self._wrong(annotation, value, key)
            if name not in hints:
                raise unknown_option(self._config_class, inner_key, key, list(hints))
            options[name] = self.fit(inner, hints[name], inner_key, options[name])
        return options

    def _fit_entries(self, value: Any, annotation: Any, key: str, present: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(annotation, value, key)
        entries = self.open(present, annotation, key) if self._adds else {}
        of_entry = Any if annotation is Any else typing.get_args(annotation)[1]
        cure = f"for an entry of that name, write {key}.NAME=..."
        for name, inner in value.items():
            word = name if isinstance(name, str) else self._as_text(name, key, cure)
            entries[word] = self.fit(inner, of_entry, f"{key}.{word}", entries.get(word))
        return entries

    def _fit_elements(self, value: Any, annotation: Any, key: str) -> list[Any]:
        """Fit a list, or the one element that stands for a list of it."""
        (of_element,) = typing.get_args(annotation)
        is_element = not isinstance(value, dict) or dataclasses.is_dataclass(of_element)
        if value is None or value == "" or not is_element:
            raise self._wrong(annotation, value, key)
        if not isinstance(value, list):
            return [self.fit(value, of_element, key)]
        return [self.fit(e, of_element, f"{key}[{number}]") for number, e in enumerate(value)]

    def _fit_leaf(self, value: Any, annotation: Any, key: str) -> Any:
        if takes_text(annotation):
            if isinstance(value, str):
                return value
            if isinstance(value, bool | int | float):
                return self._as_text(value, key, "put it in quotes")
        try:
            return ListConfig([value], element_type=annotation)[0]
        except OmegaConfBaseException as error:
            raise self._wrong(annotation, value, key) from error

    def _as_text(self, value: Any, key: str, cure: str) -> str:
        """Return as a text what was read as a number, true, false or null."""
        text, written = show_value(value), self._written
        if written is None:
            return text
        if written[:1] not in ("[", "{"):
            return written
        if text not in written.lower():
            raise UserError(f"{key}: {text} was read as a number; {cure}")
        return text

    def _wrong(self, annotation: Any, value: Any, key: str) -> UserError:
        """Return the error for a value that an option can't have."""
        must = f"must be {describe_value(annotation)}"
        if self._written is None:
            return UserError(f"{key} {must}, and what it refers to is {show_value(value)}")
        cure = ""
        if typing.get_origin(annotation) is dict and isinstance(value, str) and value:
            # The braces were forgotten, or the entry's name.
            of_entry = typing.get_args(annotation)[1]
            name = f"{key}.NAME"
            if dataclasses.is_dataclass(of_entry):
                name += f".{dataclasses.fields(of_entry)[0].name}"
            cure = (
                f"; write {as_typed(f'{key}={{{value}}}')}"
                if ": " in value
                else f"; give the entry a name: {name}={value}"
            )
        return UserError(f"{key}={show_value(value)} {must}{cure}")


def is_reference(value: Any) -> bool:
    """Whether a value stands for another option, wholly or in part."""
    return isinstance(value, str) and "${" in value


def _of_collection(annotation: Any) -> Any:
    """Return the type of a list or mapping that may be unset; any other as it is."""
    for one in typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ():
        if typing.get_origin(one) in (list, dict):
            return one
    return annotation


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
