"""`tools`: what the model may call.

All are checked, called or not: the model sees each as it was sent, and one that is described wrongly is called wrongly.
What else describes a tool (`description`, `strict` ...) is for the model alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.router.http import fields

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Reads the tools that the model sees, as they were sent; None: none.

    Raises:
        InvalidArgument: One is no function, its name is none or another's, or its arguments would be no object.
    """
    tools = body.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise fields.wrong("tools", "a list", tools)
    found: dict[str, str] = {}
    for position, tool in enumerate(tools):
        where = f"tools[{position}]"
        name = _checked_name(tool, where)
        if name in found:
            raise InvalidArgument(
                f"{where}.function.name must be its own, and {name!r} is that of {found[name]}",
                field=f"{where}.function.name",
            )
        found[name] = where
    return None if body.get("tool_choice") == "none" else tools


def _checked_name(tool: object, where: str) -> str:
    """The name of a function whose shape is right."""
    if not isinstance(tool, dict):
        raise fields.wrong(where, "an object", tool)
    if tool.get("type") != "function":
        raise fields.wrong(f"{where}.type", "'function'", tool.get("type"))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise fields.wrong(f"{where}.function", "an object", function)
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise fields.wrong(f"{where}.function.parameters", "an object", parameters)
    # Calls have their arguments by name.
    if parameters and parameters.get("type", "object") != "object":
        raise fields.wrong(f"{where}.function.parameters.type", "'object'", parameters["type"])
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise fields.wrong(f"{where}.function.name", "1 to 64 letters of ASCII, digits, _ or -", name)
    return name
