"""The body of `/v1/chat/completions`.

Message contents reach the template as texts: parts of a content are joined by newlines, the absent content of an
assistant, which may have called tools instead, is empty. All other fields of a message reach it as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.router.conversation import checked_conversation
from hma_serve.router.http import fields
from hma_serve.router.http.generation_body import Caller, GenerationBody, read_generation_body
from hma_serve.router.http.tool_choice_body import read_tool_choice
from hma_serve.router.http.tools_body import read_tools
from hma_serve.router.http.unsupported import Unsupported, refuse_unsupported
from hma_serve.text import Conversation

_UNSUPPORTED: Unsupported = {
    "chat_template": ((None,), "the model's own is used; chat_template_kwargs sets its variables"),
    "continue_final_message": ((None, False), "send the conversation as one text to /v1/completions"),
    "documents": ((None, []), "put them into a message"),
    "function_call": ((None, "none", "auto"), "use tools and tool_choice"),
    "functions": ((None, []), "use tools"),
    "modalities": ((None, [], ["text"]), "answers are text alone"),
    "web_search_options": ((None,), "put what was found into a message"),
}


def read_chat_body(body: Mapping[str, Any], caller: Caller) -> GenerationBody:
    """Reads a JSON object; raises InvalidArgument for a field of the wrong type or shape."""
    refuse_unsupported(body, _UNSUPPORTED)
    conversation = _conversation(body)
    return read_generation_body(
        body,
        caller,
        (conversation,),
        logprobs=_logprobs(body),
        default_max_tokens=None,
        calls=read_tool_choice(body, conversation.tools or ()),
    )


def _conversation(body: Mapping[str, Any]) -> Conversation:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument("messages must be a list of at least one message", field="messages")
    return checked_conversation(
        [_message(message, f"messages[{position}]") for position, message in enumerate(messages)],
        tools=read_tools(body),
        add_generation_prompt=fields.boolean(body, "add_generation_prompt", default=True),
        variables=fields.obj(body, "chat_template_kwargs"),
    )


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidArgument(f"{where} must be an object", field=where)
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidArgument(f"{where}.role must be a string", field=f"{where}.role")
    calls = message.get("tool_calls")
    if calls is not None and not _are_objects(calls):
        raise InvalidArgument(f"{where}.tool_calls must be a list of objects", field=f"{where}.tool_calls")
    for position, call in enumerate(calls or ()):
        _check_arguments(call, f"{where}.tool_calls[{position}].function")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    return {**message, "content": _content(content, f"{where}.content")}


def _check_arguments(call: Mapping[str, Any], where: str) -> None:
    """Refuses arguments that no call has; some clients send an object itself, or an empty text for none."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if arguments in (None, "") or isinstance(arguments, dict):
        return
    if not isinstance(arguments, str) or not _is_object(arguments):
        raise fields.wrong(f"{where}.arguments", "the text of a JSON object", arguments)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidArgument(f"{where} must be a string or a list of text parts", field=where)
    return "\n".join(_part(part, where) for part in content)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(text := part.get("text"), str):
        return text
    raise InvalidArgument(f"{where} may have parts of type text only; this model reads nothing else", field=where)


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """Alternatives per token: `logprobs` switches them on, `top_logprobs` says how many beside the token itself."""
    top = fields.integer(body, "top_logprobs")
    if fields.boolean(body, "logprobs"):
        return top or 0
    if top:
        raise InvalidArgument("top_logprobs needs logprobs=true", field="top_logprobs")
    return None
