"""What decoded copies of running prompts' KV may take: they save time, nothing needs them."""

from __future__ import annotations

HOST_DECODED_BYTES = 1 << 30
"""Of this machine's memory at most."""


class DecodedBudget:
    """Bytes that decoded copies of running requests' KV may take; single-threaded.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Reserves bytes if there is room."""
        if self.used + size > self._limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        """Gives reserved bytes back."""
        self.used -= size
