"""How long to wait between attempts: doubling, capped, jittered so that a fleet does not return in step."""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """The next wait after each failure in a row.

    Args:
        first: Seconds before the second attempt, before jitter.
        most: Cap in seconds, before jitter.
        jitter: Draws from [0, 1); a wait is between half of its nominal value and all of it.
    """

    def __init__(self, first: float, most: float, jitter: Callable[[], float]) -> None:
        self._first, self._most, self._jitter = first, most, jitter
        self._nominal = first

    def next(self) -> float:
        """Seconds to wait now."""
        nominal, self._nominal = self._nominal, min(self._most, 2 * self._nominal)
        return nominal * (0.5 + 0.5 * self._jitter())

    def reset(self) -> None:
        """After a success."""
        self._nominal = self._first
