"""The body of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import MAX_TOKEN_ID
from hma_serve.router.completion import Prompt
from hma_serve.router.http import fields
from hma_serve.router.http.generation_body import Caller, GenerationBody, read_generation_body
from hma_serve.router.http.unsupported import Unsupported, refuse_unsupported

DEFAULT_MAX_TOKENS = 16

_CHAT_HAS_THEM = "only conversations have tools; use /v1/chat/completions"
_UNSUPPORTED: Unsupported = {
    "function_call": ((None, "none", "auto"), _CHAT_HAS_THEM),
    "functions": ((None, []), _CHAT_HAS_THEM),
    "tool_choice": ((None, "none", "auto"), _CHAT_HAS_THEM),
    "tools": ((None, []), _CHAT_HAS_THEM),
}


def read_completion_body(body: Mapping[str, Any], caller: Caller) -> GenerationBody:
    """Reads a JSON object; raises InvalidArgument for a field of the wrong type or shape."""
    refuse_unsupported(body, _UNSUPPORTED)
    _refuse_logprobs_of_prompts(body)
    return read_generation_body(
        body,
        caller,
        _prompts(body),
        logprobs=fields.integer(body, "logprobs"),
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )


def _prompts(body: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """A string, a list of token ids, or a list of either of these."""
    value = body.get("prompt")
    if isinstance(value, str):
        return (fields.checked_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidArgument("prompt must be a string, a list of token ids, or a list of these", field="prompt")
    if not value:
        raise InvalidArgument("prompt must not be empty", field="prompt")
    if fields.is_integer(value[0]):
        return (_token_ids(value),)
    return tuple(_one_of_many(item) for item in value)


def _one_of_many(item: object) -> Prompt:
    if isinstance(item, str):
        return fields.checked_text(item, "prompt")
    if isinstance(item, list):
        return _token_ids(item)
    raise InvalidArgument("every prompt in the list must be a string or a list of token ids", field="prompt")


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    # Prompts have tens of thousands of ids: look at the set of types, not at each value.
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID):
        raise InvalidArgument("token ids must be non-negative integers", field="prompt")
    return tuple(value)


def _refuse_logprobs_of_prompts(body: Mapping[str, Any]) -> None:
    if fields.boolean(body, "echo") and body.get("logprobs") is not None:
        raise InvalidArgument(
            "logprobs of the prompt are not supported: echo and logprobs exclude each other", field="echo"
        )
