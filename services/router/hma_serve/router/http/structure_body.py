"""Structured output as bodies ask for it: OpenAI's `response_format`, and the fields that vLLM's clients send.

One body may ask in one way only. What another server would follow and this one cannot is refused by name, because an
answer of another form than was asked for is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import Structure
from hma_serve.router.http import fields

_REFUSED = ("guided_grammar", "guided_whitespace_pattern", "structural_tag")


def read_structure(body: Mapping[str, Any]) -> Structure | None:
    """Reads the form that the output must have; None: any.

    Raises:
        InvalidArgument: A field has the wrong shape, two disagree, or one cannot be followed.
    """
    for name in _REFUSED:
        if body.get(name) is not None:
            raise InvalidArgument(f"{name} is not supported", field=name)
    found = {name: made for name, read in _READERS.items() if (made := _read(body, name, read)) is not None}
    if len(found) > 1:
        raise InvalidArgument(f"{' and '.join(found)} exclude each other", field=list(found)[1])
    return next(iter(found.values()), None)


def structure_field(body: Mapping[str, Any]) -> str | None:
    """The field in which a body that was read asks for a structure, None where it asks for none."""
    return next((name for name, read in _READERS.items() if _read(body, name, read) is not None), None)


def _read(body: Mapping[str, Any], name: str, read: Callable[[Any, str], Structure | None]) -> Structure | None:
    value = body.get(name)
    if value is None:
        return None
    try:
        return read(value, name)
    except InvalidArgument as exc:
        # The value knows what is wrong with it, the body where it stands.
        raise InvalidArgument(exc.message, field=name) from exc


def _response_format(value: Any, name: str) -> Structure | None:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} must be an object", field=name)
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return Structure.json_object()
        case "json_schema":
            described = fields.obj(value, "json_schema")
            if "schema" not in described:
                raise InvalidArgument(f"{name}.json_schema needs a schema", field=name)
            return _schema(described["schema"], f"{name}.json_schema.schema")
        case _:
            raise InvalidArgument(f"{name}.type must be text, json_object or json_schema", field=name)


def _structured_outputs(value: Any, name: str) -> Structure | None:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} must be an object", field=name)
    given = {kind: wanted for kind, wanted in value.items() if wanted is not None and wanted is not False}
    kinds = [kind for kind in _OUTPUTS if kind in given]
    unknown = sorted(given.keys() - _OUTPUTS.keys() - {"disable_any_whitespace", "disable_fallback"})
    if unknown or len(kinds) != 1:
        listed = ", ".join(_OUTPUTS)
        raise InvalidArgument(f"{name} takes exactly one of {listed}" + (f", not {unknown[0]}" if unknown else ""))
    return _OUTPUTS[kinds[0]](given[kinds[0]], f"{name}.{kinds[0]}")


def _schema(value: Any, name: str) -> Structure:
    if isinstance(value, str):
        return Structure.json_schema(fields.checked_text(value, name))
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} must be a JSON schema")
    return Structure.json_schema(value)


def _json_object(value: Any, name: str) -> Structure | None:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false")
    return Structure.json_object() if value else None


def _regex(value: Any, name: str) -> Structure:
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a string")
    return Structure.regex(fields.checked_text(value, name))


def _choice(value: Any, name: str) -> Structure:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidArgument(f"{name} must be a list of strings")
    return Structure.choice(fields.checked_text(text, name) for text in value)


_OUTPUTS: dict[str, Callable[[Any, str], Structure | None]] = {
    "json": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
}

_READERS: dict[str, Callable[[Any, str], Structure | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
}
