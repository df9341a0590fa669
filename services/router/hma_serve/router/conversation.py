"""What a client's conversation may hold, whichever API it came by.

Everything a client sends reaches the template as data. Roles are checked, because templates drop messages whose role
they do not know, and an answer to half of a conversation looks like one to all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.text import ChatTemplate, Conversation

MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_VARIABLES = 32
MAX_VARIABLE_CHARS = 1024

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# OpenAI's newer names for older roles; templates that know them see them as they are.
_SAME_AS = {"developer": "system", "function": "tool"}
_MAX_ROLE_CHARS = 64


def checked_conversation(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any],
) -> Conversation:
    """A conversation within the limits; raises InvalidArgument."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidArgument(f"a conversation may have at most {MAX_MESSAGES} messages", field="messages")
    if tools is not None and len(tools) > MAX_TOOLS:
        raise InvalidArgument(f"at most {MAX_TOOLS} tools are allowed", field="tools")
    return Conversation(
        messages=messages,
        tools=tools or None,
        add_generation_prompt=add_generation_prompt,
        variables=_variables(variables),
    )


def with_roles_of(conversation: Conversation, template: ChatTemplate | None) -> Conversation:
    """The conversation in the roles that the model's template handles; raises InvalidArgument for other roles."""
    if template is None:
        return conversation
    messages = [
        message
        if (role := _role(message["role"], template, position)) == message["role"]
        else {**message, "role": role}
        for position, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=messages)


def _role(role: str, template: ChatTemplate, position: int) -> str:
    if role in _ROLES:
        return role
    if role and len(role) <= _MAX_ROLE_CHARS and template.names_role(role):
        return role
    if role in _SAME_AS:
        return _SAME_AS[role]
    known = ", ".join(sorted(_ROLES | _SAME_AS.keys()))
    raise InvalidArgument(
        f"the role {role[:_MAX_ROLE_CHARS]!r} is not known; use one of {known}", field=f"messages[{position}].role"
    )


def _variables(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Single values only: what a template does with more is nobody's business but its own."""
    if len(given) > MAX_VARIABLES:
        raise InvalidArgument(
            f"chat_template_kwargs may have at most {MAX_VARIABLES} entries", field="chat_template_kwargs"
        )
    for name, value in given.items():
        if not (name.isascii() and name.isidentifier() and len(name) <= _MAX_ROLE_CHARS):
            raise InvalidArgument(
                "the names in chat_template_kwargs must be plain identifiers", field="chat_template_kwargs"
            )
        if not _is_simple(value):
            raise InvalidArgument(
                f"chat_template_kwargs.{name} must be null, a boolean, a number or a text of at most "
                f"{MAX_VARIABLE_CHARS} characters",
                field="chat_template_kwargs",
            )
    return dict(given)


def _is_simple(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_VARIABLE_CHARS
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int)
