"""Where requests wait: a bounded queue in front of the fleet, earliest deadline first.

A request that can be placed now never waits. One that cannot is queued until the fleet has room, and is shed when the
queue is full or its time is up (overload: RESOURCE_EXHAUSTED, come back later) or when no worker that is alive could
serve it (UNAVAILABLE). The queue is looked at after every change of the fleet and at no other time, so nothing polls.

Two lines are kept, one for requests that need a prefill worker and one for the others, because a full prefill pool must
not hold up a prompt that only decode touches. Within a line the order is strict: the first waits for room and nobody
overtakes it, so long prompts are not starved by short ones.

The event loop's clock is the only clock; a loop with virtual time runs the same code.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from hma_serve.core.errors import ContextLengthExceeded, DeadlineExceeded, HmaError, ResourceExhausted, Unavailable
from hma_serve.router.fleet import Fleet
from hma_serve.router.placement import Demand, Placement, Reject, Why, place

_RETRY_WHEN_FULL = 1.0
_RETRY_WHEN_NOBODY = 2.0


class Shed(ResourceExhausted):
    """Refused by admission. `reason` is a label for metrics."""

    reason: ClassVar[str] = "overload"


class QueueFull(Shed):
    """The queue was full on arrival."""

    reason = "queue_full"


class WaitedTooLong(Shed):
    """No room came up in the longest time a request may wait."""

    reason = "waited_too_long"


class Held(Protocol):
    """A placement that counts against its workers until it is released."""

    @property
    def placement(self) -> Placement:
        """The workers."""
        ...

    def release_prefill(self) -> None:
        """The prefill worker has done its part."""

    def release(self) -> None:
        """The request has left both workers."""


class Capacity(Protocol):
    """The fleet as admission sees it."""

    @property
    def fleet(self) -> Fleet:
        """The workers as known now."""
        ...

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` after every change that may let a waiting request be placed; returns the way out."""
        ...

    def hold(self, placement: Placement, prompt_tokens: int) -> Held:
        """Counts the placement against its workers from now on."""
        ...


@dataclass(order=True, slots=True)
class _Waiter:
    """A queued request; ordered by priority, then by when it must be placed, then by arrival."""

    negative_priority: int
    due: float
    arrival: int
    demand: Demand = field(compare=False)
    admitted: asyncio.Future[Held] = field(compare=False)


class Admission:
    """The queue.

    Args:
        capacity: Where requests are placed.
        max_waiting: Requests that may wait at the same time.
        max_wait: Seconds that one request may wait.
        local_prefill: As in `place`.
    """

    def __init__(
        self, capacity: Capacity, *, max_waiting: int = 1024, max_wait: float = 60.0, local_prefill: bool = True
    ) -> None:
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._max_wait = max_wait
        self._local_prefill = local_prefill
        self._pairs: list[_Waiter] = []
        self._decode_only: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._unsubscribe = capacity.subscribe(self._on_change)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._pairs) + len(self._decode_only)

    def close(self) -> None:
        """Stops listening to the fleet; call when nothing waits any more."""
        self._unsubscribe()

    async def acquire(self, demand: Demand, *, arrived: float, deadline: float, priority: int = 0) -> Held:
        """Waits for room on a pair of workers; the caller must release what it gets.

        Args:
            demand: The request.
            arrived: When it came to the router, seconds of the loop's clock; a retry keeps its first arrival.
            deadline: When it is to be given up, same clock.
            priority: Higher goes first.

        Raises:
            ResourceExhausted: The queue is full, or the request waited too long; `Shed` has the reason.
            Unavailable: No worker that is alive could serve it.
            ContextLengthExceeded: No worker's window is large enough.
            DeadlineExceeded: The deadline came first.
        """
        due = min(deadline, arrived + self._max_wait)
        if asyncio.get_running_loop().time() >= due:
            raise self._too_late(deadline <= due)
        line = self._pairs if demand.packed_tokens else self._decode_only
        busy = "other requests wait already"
        if not line:
            outcome = self._place(demand)
            if isinstance(outcome, Placement):
                return self._capacity.hold(outcome, demand.prompt_tokens)
            if outcome.why is not Why.BUSY:
                raise _refusal(outcome)
            busy = outcome.message
        if self.waiting >= self._max_waiting:
            raise QueueFull(f"the queue is full ({busy}); try again later", retry_after=_RETRY_WHEN_FULL)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(-priority, due, next(self._arrivals), demand, loop.create_future())
        timer = loop.call_at(due, self._give_up, waiter, self._too_late(deadline <= due))
        return await self._wait(line, waiter, timer)

    async def _wait(self, line: list[_Waiter], waiter: _Waiter, timer: asyncio.TimerHandle) -> Held:
        insort(line, waiter)
        # It may have become the first in line, and may fit where the one behind it does not.
        self._serve(line)
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            # Admission and cancellation can fall into the same turn of the loop.
            if waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception():
                waiter.admitted.result().release()
            raise
        finally:
            timer.cancel()
            position = bisect_left(line, waiter)
            if position < len(line) and line[position] is waiter:
                del line[position]
                self._serve(line)

    def _on_change(self) -> None:
        self._serve(self._pairs)
        self._serve(self._decode_only)

    def _serve(self, line: list[_Waiter]) -> None:
        """Places waiters in order until the first that has to go on waiting."""
        while line:
            waiter = line[0]
            if not waiter.admitted.done():
                outcome = self._place(waiter.demand)
                if isinstance(outcome, Placement):
                    waiter.admitted.set_result(self._capacity.hold(outcome, waiter.demand.prompt_tokens))
                elif outcome.why is Why.BUSY:
                    return
                else:
                    waiter.admitted.set_exception(_refusal(outcome))
            del line[0]

    def _place(self, demand: Demand) -> Placement | Reject:
        now = asyncio.get_running_loop().time()
        return place(demand, self._capacity.fleet, now, local_prefill=self._local_prefill)

    def _give_up(self, waiter: _Waiter, error: HmaError) -> None:
        if not waiter.admitted.done():
            waiter.admitted.set_exception(error)

    def _too_late(self, deadline_passed: bool) -> HmaError:
        if deadline_passed:
            return DeadlineExceeded("the deadline passed while the request waited for a worker")
        return WaitedTooLong(f"no worker had room within {self._max_wait:g} s", retry_after=_RETRY_WHEN_FULL)


def _refusal(reject: Reject) -> HmaError:
    if reject.why is Why.TOO_LONG:
        return ContextLengthExceeded(reject.message, field="max_tokens")
    return Unavailable(reject.message, retry_after=_RETRY_WHEN_NOBODY)
