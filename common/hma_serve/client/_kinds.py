"""Which kind of value an argument takes.

Whether a number is in its range is decided where requests are defined (`core.request`), which relies on its being a
number. Python's `True` is none here, as JSON's is none to the router; numpy's integers and floats are.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import Slo, Structure


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        what: Its name in a sentence.
        holds: Whether a value is of it; may raise TypeError instead of answering no.
    """

    what: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: object) -> None:
        """Raises InvalidArgument that names the argument when its value is of another kind."""
        try:
            if self.holds(value):
                return
        except TypeError:
            pass
        raise InvalidArgument(f"{name} must be {self.what}, not {reprlib.repr(value)}", field=name)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_many(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _is_list(value: object) -> bool:
    # An array without dimensions has an iterator's name and raises.
    return _is_many(value) and isinstance(value, Collection) and len(value) >= 0


def _is_integer(value: object) -> bool:
    return _is(numbers.Integral, value)


def _is_number(value: object) -> bool:
    return _is(numbers.Real, value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


INTEGER = Kind("an integer", _is_integer)
NUMBER = Kind("a number", _is_number)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _is_text)
TEXTS = Kind(
    "a text or a sequence of texts", lambda value: _is_text(value) or (_is_list(value) and all(map(_is_text, value)))
)
TOKENS = Kind("a sequence of token ids", lambda value: _is_list(value) and all(map(_is_integer, value)))
# Prompts have tens of thousands of ids, which are looked at when they are copied.
PROMPT = Kind("a text or a sequence of token ids", lambda value: _is_text(value) or _is_list(value))
BIASES = Kind(
    "a mapping from token ids to numbers",
    lambda value: isinstance(value, Mapping) and all(map(_is_integer, value)) and all(map(_is_number, value.values())),
)
STRUCTURE = Kind("a Structure", lambda value: isinstance(value, Structure))
SLO = Kind("an Slo", lambda value: isinstance(value, Slo))
MESSAGES = Kind("a sequence of messages", _is_many)
MESSAGE = Kind("a mapping with role and content", lambda value: isinstance(value, Mapping))
NAMED = Kind("a mapping from names to values", lambda value: isinstance(value, Mapping) and all(map(_is_text, value)))
HEADERS = Kind("a mapping from names to texts", lambda value: NAMED.holds(value) and all(map(_is_text, value.values())))
