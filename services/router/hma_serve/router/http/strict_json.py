"""JSON as the standard has it: no NaN, no infinities, whatever the depth."""

from __future__ import annotations

import json
import sys
from typing import Any

from hma_serve.core.errors import InvalidArgument


def _no_constant(name: str) -> Any:
    raise InvalidArgument(f"the body is not valid JSON: {name} is not JSON")


def loads_object(body: bytes) -> dict[str, Any]:
    """Parses a body that must be one JSON object.

    Raises:
        InvalidArgument: It is empty, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    if not body.strip():
        raise InvalidArgument("the body is empty; it must be a JSON object")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as exc:
        raise InvalidArgument("the body is not UTF-8") from exc
    except RecursionError as exc:
        raise InvalidArgument("the body is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise InvalidArgument(f"the body is not valid JSON: {exc}") from exc
    except ValueError as exc:
        raise InvalidArgument(f"the body has a number of more than {sys.get_int_max_str_digits()} digits") from exc
    if not isinstance(value, dict):
        raise InvalidArgument("the body must be a JSON object")
    return value


def dumps(value: object) -> bytes:
    """Serialises compactly; pure ASCII, so that no client can guess the encoding wrongly."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
