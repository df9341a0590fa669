"""Whether, where and when to try again: decided here, without I/O, clock or randomness of its own.

A request is tried again only before any of its answer has arrived, and only after a failure that says that
none will: the router was not reached or went away (UNAVAILABLE), or it was full and named a time (RESOURCE_EXHAUSTED
with `retry_after`). Each address is tried once per round; between rounds there is a pause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hma_serve.client import _kinds as kinds
from hma_serve.core.errors import HmaError, InvalidArgument, ResourceExhausted, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """How persistent a client is.

    Attributes:
        rounds: How often the list of addresses is gone through, at most; 1 tries every address once.
        initial_backoff: Seconds before the second round; doubled for each further one, and jittered.
        max_backoff: Longest pause of that kind, seconds.
        max_retry_after: Longest wait that a full server may ask for, seconds; if it asks for more, the error is raised.
    """

    rounds: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 2.0
    max_retry_after: float = 10.0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InvalidArgument(f"retry.rounds must be at least 1, not {self.rounds}", field="retry")
        if min(self.initial_backoff, self.max_backoff, self.max_retry_after) < 0:
            raise InvalidArgument("the retry policy's times must not be negative", field="retry")


class Deadline:
    """The moment at which a request's time is up, on a clock that nobody sets.

    Args:
        timeout: Seconds from now; None: never.
        clock: Monotonic seconds.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if timeout is not None and not (kinds.NUMBER.holds(timeout) and 0 < timeout < math.inf):
            raise InvalidArgument(f"timeout must be a positive number of seconds, not {timeout!r}", field="timeout")
        self.timeout = timeout
        self._clock = clock
        self._end = None if timeout is None else clock() + timeout

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - self._clock())


class Attempts:
    """The course of one request over the addresses.

    Args:
        policy: How persistent to be.
        addresses: How many there are.
        first: The one to try first.
        deadline: Bounds the waits; a wait that would outlast it is not begun.
        random: Uniform in [0, 1); spreads clients that failed together.

    Attributes:
        address: Number of the address to try now.
        deadline: As given.
    """

    def __init__(
        self, policy: RetryPolicy, addresses: int, first: int, deadline: Deadline, random: Callable[[], float]
    ) -> None:
        self._policy = policy
        self._addresses = addresses
        self.deadline = deadline
        self._random = random
        self._failed_in_round = 0
        self._rounds = 0
        self.address = first

    def after(self, error: HmaError) -> float | None:
        """Seconds to wait before `address`, which may be another one now, is tried; None: give up, raise the error."""
        if isinstance(error, Unavailable):
            self._failed_in_round += 1
        elif isinstance(error, ResourceExhausted) and error.retry_after is not None:
            self._failed_in_round = self._addresses  # all routers share one fleet: another would say the same
        else:
            return None
        self.address = (self.address + 1) % self._addresses
        wait = 0.0 if self._failed_in_round < self._addresses else self._next_round(error.retry_after)
        remaining = self.deadline.remaining()
        if wait is None or (remaining is not None and wait >= remaining):
            return None
        return wait

    def _next_round(self, retry_after: float | None) -> float | None:
        self._failed_in_round = 0
        self._rounds += 1
        if self._rounds >= self._policy.rounds or (retry_after or 0.0) > self._policy.max_retry_after:
            return None
        backoff = min(self._policy.max_backoff, self._policy.initial_backoff * 2.0 ** (self._rounds - 1))
        return max(backoff * (0.5 + 0.5 * self._random()), (retry_after or 0.0) * (1.0 + 0.25 * self._random()))
