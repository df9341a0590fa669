"""How a prompt is divided between prefill and decode.

Only whole 32-token groups cross the wire (one tile of every block codec), and decode always keeps at least one prompt
token for itself: it needs that token's hidden state to draw the first new one.
"""

from __future__ import annotations

GROUP_TOKENS = 32
"""Tokens in one group; every token range on the wire is a multiple of it."""


def packed_tokens(prompt_tokens: int) -> int:
    """Prompt tokens that prefill computes and sends; decode runs the remaining 1..32.

    Args:
        prompt_tokens: Length of the prompt, at least 1.
    """
    return (prompt_tokens - 1) // GROUP_TOKENS * GROUP_TOKENS
