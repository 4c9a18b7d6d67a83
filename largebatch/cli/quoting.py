"""How a value is written so that Hydra's grammar, and a shell, read it as it is."""

import re
import shlex
import typing
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from largebatch.cli.options import describe_value, takes_text

SHELL_SPECIAL = frozenset('$`"\\!')
"""What a shell obeys inside double quotes."""
OPENING, CLOSING = "[{(", "]})"


def quoted(text: str) -> str:
    """Quote a text so that Hydra reads it back as it is.

    >>> print(quoted("a=b"), quoted("5 $"))
    'a=b' "5 $"
    """
    double = bool(SHELL_SPECIAL & set(text)) and "'" not in text
    return QuotedString(text, Quote.double if double else Quote.single).with_quotes()


def as_typed(argument: str) -> str:
    """Write an argument as it is typed into a shell.

    >>> print(as_typed("input='a=b'"), as_typed('input="5 $"'))
    "input='a=b'" 'input="5 $"'
    """
    # A backslash before ' stays one, for a shell too.
    special = SHELL_SPECIAL & set(argument.replace("\\'", ""))
    return shlex.quote(argument) if special else f'"{argument}"'


def cure(key: str, value: str, annotation: Any, *, is_read: Callable[[str], bool]) -> str:
    """Say how to write a value that can't be read.

    Args:
        key: The option, with its prefix.
        value: What was written after the =.
        annotation: Type of the option.
        is_read: Whether a value can be read.
    """
    # Neither a shell nor this program makes a folder of the ~ inside a value.
    value = re.sub(r"(?<![^\[{,:\s])~(?=/|$)", "${oc.env:HOME}", value)
    # A reference that is not closed is none.
    value = re.sub(r"(?<!\\)\$\{(?![^{}]*\})", r"\\${", value)
    if takes_text(annotation):
        written = value if is_read(value) else quoted(value)
    else:
        written = _close(value.strip())
        if typing.get_origin(annotation) is list and not written.startswith("["):
            written = f"[{written}]"
        written = _mend(written, is_read)
        # A number, say, is not put into quotes: they would make a text of it.
        if annotation is not Any and written[:1] in ("'", '"'):
            written = ""
    if not written or not is_read(written):
        return f"{key} must be {describe_value(annotation)}"
    return f"write {as_typed(f'{key}={written}')}"


def _close(value: str) -> str:
    """Add the bracket that a list or mapping lacks at its end."""
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening):
            return value.removesuffix(closing) + closing
    return value


def _mend(value: str, is_read: Callable[[str], bool]) -> str:
    """Quote, inside lists and mappings, the texts that can't be read otherwise."""
    value = value.strip()
    if is_read(value):
        return value
    inner = value[1:-1]
    if value.startswith("[") and value.endswith("]"):
        return f"[{', '.join(_mend(part, is_read) for part in _split(inner))}]"
    if value.startswith("{") and value.endswith("}"):
        entries = [part.partition(":" if ":" in part else "=") for part in _split(inner)]
        if all(colon for _, colon, _ in entries):
            # The grammar wants names without quotes.
            names = (name.strip().strip("'\"") for name, _, _ in entries)
            values = (_mend(entry, is_read) for _, _, entry in entries)
            return "{" + ", ".join(map(": ".join, zip(names, values, strict=True))) + "}"
    return quoted(value)


def _split(text: str) -> Iterator[str]:
    """Yield the parts between commas that no brackets or quotes enclose."""
    part, depth, quote = "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in OPENING) - (character in CLOSING)
        if character == "," and not quote and depth <= 0:
            yield part
            part = ""
        else:
            part += character
    if part.strip():
        yield part
