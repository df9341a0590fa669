"""How many tokens of which requests are computed together: the chunk, chosen against the due times of those waiting.

The most urgent request leads, and its next chunk is the batch; short prompts fill what room is left. Three rules say
who may take room from whom. Somebody who would be late behind the whole lead gets a place beside it at once: the lead's
chunk shrinks, to half of the batch at least, so a long prompt delays nobody by its length and still goes on. Others
come along only as far as the lead stays in time. And requests that began a chunk together stay together while they can,
because layers are computed in step.

Pure functions of times and counts. `token_ns` is what a token's computation takes, all layers, as measured lately; 0
while nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hma_serve.core.groups import GROUP_TOKENS


class Claim(Protocol):
    """What counts of a request."""

    @property
    def remaining(self) -> int:
        """Tokens to compute; whole groups."""
        ...

    @property
    def due_ns(self) -> int:
        """When its first token is due."""
        ...


def urgent_behind(lead: Claim, other: Claim, *, now_ns: int, token_ns: float) -> bool:
    """Whether the other one would be late if all of the lead came first."""
    return now_ns + (lead.remaining + other.remaining) * token_ns > other.due_ns


def lead_tokens(lead: Claim, urgent: Iterable[Claim], *, most: int) -> int:
    """Tokens of the lead's next chunk.

    Args:
        lead: The most urgent request, between two chunks.
        urgent: Those that would be late behind it.
        most: Tokens of a batch, whole groups.
    """
    waiting = sum(other.remaining for other in urgent)
    return min(lead.remaining, most - whole_groups(min(waiting, most // 2)))


def spare_tokens(lead: Claim, *, most: int, now_ns: int, token_ns: float) -> int:
    """Tokens of others that each of the lead's batches can take along without making the lead late."""
    batches = -(-lead.remaining // most)
    if not token_ns or not batches:
        return most
    slack = (lead.due_ns - now_ns) / token_ns - lead.remaining
    return max(0, int(min(slack / batches, most)))


def whole_groups(tokens: int) -> int:
    """The largest number of tokens in whole groups that is not above."""
    return tokens // GROUP_TOKENS * GROUP_TOKENS
