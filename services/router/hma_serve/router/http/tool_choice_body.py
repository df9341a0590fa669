"""`tool_choice` and `parallel_tool_calls`: which calls the answer must be.

A call that is asked for is a form of the output like a schema, so the model cannot help making it. Without one it makes
as many calls as it likes, or none, and nothing can hold it to one: that is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import Structure
from hma_serve.router.http import fields

_CHOICE, _PARALLEL = "tool_choice", "parallel_tool_calls"
_MAX_LISTED = 8


def read_tool_choice(body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Structure | None:
    """Reads the calls that the output must be; None: the model decides.

    Args:
        body: The object.
        tools: Those that the model sees, as `tools_body` has read them.

    Raises:
        InvalidArgument: The choice has the wrong shape, names no tool, or cannot be followed.
    """
    choice = body.get(_CHOICE)
    parallel = fields.boolean(body, _PARALLEL, default=True)
    if choice in (None, "none", "auto"):
        if tools and not parallel:
            raise InvalidArgument(
                f"{_PARALLEL} is not supported: a model that decides itself what it calls cannot be held to one call; "
                "tool_choice can ask for one",
                field=_PARALLEL,
            )
        return None
    functions = [_function(tool) for tool in tools]
    if choice == "required":
        if not functions:
            raise InvalidArgument(f"{_CHOICE} is required, but there are no tools", field=_CHOICE)
        return Structure.tool_calls(functions, one=not parallel)
    name = _named(choice)
    named = [function for function in functions if function["name"] == name]
    if not named:
        raise InvalidArgument(
            f"{_CHOICE} names the function {fields.shown(name)}, and tools has {_listed(functions)}", field=_CHOICE
        )
    return Structure.tool_calls(named, one=True)


def _named(choice: object) -> str:
    """The name in a choice of one function."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            return name
    raise InvalidArgument(
        f"{_CHOICE} must be none, auto, required or a function, "
        'as in {"type": "function", "function": {"name": "weather"}}',
        field=_CHOICE,
    )


def _listed(functions: Sequence[Mapping[str, Any]]) -> str:
    """Their names, or the first of many."""
    names = [repr(function["name"]) for function in functions[:_MAX_LISTED]]
    more = len(functions) - len(names)
    return (", ".join(names) or "none") + (f" and {more} more" if more else "")


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of a tool must be like; the rest of what describes it is for the model."""
    function = tool["function"]
    return {name: function[name] for name in ("name", "parameters") if name in function}
