"""Fields that other servers follow and this one cannot: refused by name, because ignored they would change the answer.

A value that asks for nothing is accepted: clients send `null`, empty lists and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from hma_serve.core.errors import InvalidArgument

Unsupported: TypeAlias = Mapping[str, tuple[tuple[object, ...], str]]
"""By field: the values that ask for nothing, and what to do instead."""

IN_GENERATION: Unsupported = {
    "allowed_token_ids": ((None, []), "use logit_bias or guided_choice"),
    "bad_words": ((None, []), "use logit_bias"),
    "prompt_logprobs": ((None,), "logprobs gives those of generated tokens"),
    "skip_special_tokens": ((None, True), "special tokens have no text; return_token_ids gives their ids"),
    "suffix": ((None, ""), "text is continued, never filled in; send what comes before it alone"),
    "truncate_prompt_tokens": ((None,), "send a prompt that fits"),
    "use_beam_search": ((None, False), "ask for n completions and choose"),
}
"""Refused by both generating endpoints."""


def refuse_unsupported(body: Mapping[str, Any], unsupported: Unsupported) -> None:
    """Raises InvalidArgument for the first field that asks for something."""
    for name, (neutral, instead) in unsupported.items():
        if body.get(name) not in neutral:
            raise InvalidArgument(f"{name} is not supported: {instead}", field=name)
