"""Fields by the names that the client sent them under.

Values are checked where they are born, some only by decode, and name themselves as the whole system knows them; a body
may have brought them under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hma_serve.router.http.structure_body import structure_field


def sent_name(field: str, body: Mapping[str, Any]) -> str:
    """The name that the body has for a field."""
    match field:
        case "structure":
            return structure_field(body) or "tools"
        case "max_tokens" if body.get("max_completion_tokens") is not None:
            return "max_completion_tokens"
        case "logprobs" if body.get("logprobs") is True and body.get("top_logprobs") is not None:
            return "top_logprobs"
    return field
