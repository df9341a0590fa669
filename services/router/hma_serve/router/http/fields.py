"""Reading single fields of a JSON body: the right type or a clear refusal.

`null` and absence both mean the default. JSON's `true` is not a number here, whatever Python thinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hma_serve.core.errors import InvalidArgument

MAX_INTEGER = 2**64 - 1


def boolean(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A truth value."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def integer(body: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A whole number that fits 64 bits."""
    value = body.get(name)
    if value is None:
        return default
    if not is_integer(value):
        raise wrong(name, "an integer", value)
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise InvalidArgument(f"{name} is out of range", field=name)
    return int(value)


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """Any finite number."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgument(f"{name} is out of range", field=name) from None


def text(body: Mapping[str, Any], name: str, default: str = "") -> str:
    """A string of Unicode characters."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    return checked_text(value, name)


def checked_text(value: str, name: str) -> str:
    """The string, unless it has a lone surrogate: JSON can escape one, UTF-8 cannot hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{name} has a lone surrogate and is not valid Unicode", field=name) from None
    return value


def obj(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; empty by default."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def is_integer(value: object) -> bool:
    """Whether the value is a JSON integer."""
    return isinstance(value, int) and not isinstance(value, bool)


_JSON_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
}
_MAX_SHOWN_CHARS = 64


def wrong(name: str, expected: str, value: object) -> InvalidArgument:
    """The refusal of a value that is not what it must be."""
    found = shown(value) if isinstance(value, str) else _JSON_NAMES.get(type(value), "null")
    return InvalidArgument(f"{name} must be {expected}, not {found}", field=name)


def shown(text: str) -> str:
    """A client's text in a message: quoted, and not all of a long one."""
    return repr(text) if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]!r}..."
