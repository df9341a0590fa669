"""Where requests wait: a bounded queue in front of the fleet.

A request that can be placed now never waits. One that cannot is queued until the fleet has room, and is shed when the
queue is full, when at the pace at which the queue moves (`line_pace.py`) it would wait for longer than it may, or when
its time is up (overload: RESOURCE_EXHAUSTED, come back later), or when no worker that is alive could serve it
(UNAVAILABLE). The pace is asked on arrival, and again of those who wait, since the first of them came before it was
known; then the doubt is in their favour. A full queue is no privilege of those who filled it: who comes with a higher
priority, or of a tenant that has less in it, takes the place of the last. The queue is looked at after every change of
the fleet and at no other time, so nothing polls.

Two lines are kept, one for requests that need a prefill worker and one for the others, because a full prefill pool
must not hold up a prompt that only decode touches. Within a line (`line.py`) the order is strict: the first waits for
room and nobody overtakes it. Between the lines it is strict where decode is what the first waits for: whoever comes
after it in the other line leaves the decode workers alone that it may run on. So large requests are not starved by
small ones. Who comes after whom is the same as within a line, but tenants take turns there, whatever their requests
cost.

The event loop's clock is the only clock; a loop with virtual time runs the same code.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from hma_serve.core.errors import ContextLengthExceeded, DeadlineExceeded, HmaError, ResourceExhausted, Unavailable
from hma_serve.router.fleet import Fleet
from hma_serve.router.line import Line, Waiter
from hma_serve.router.line_pace import LinePace
from hma_serve.router.placement import Demand, Placement, Reject, Why, place

_RETRY_WHEN_FULL = 1.0
_RETRY_WHEN_NOBODY = 2.0
_LONGEST_RETRY = 60.0

# How often those who wait are looked through for whom waiting is in vain, and how many are told so at a time: a line of
# thousands takes milliseconds, and what a pace of a moment says of too many, the next may take back.
_LOOK_SECONDS = 1.0
_GIVEN_UP_AT_ONCE = 100


class Shed(ResourceExhausted):
    """Refused by admission. `reason` is a label for metrics."""

    reason: ClassVar[str] = "overload"


class QueueFull(Shed):
    """The queue was full on arrival."""

    reason = "queue_full"


class WaitedTooLong(Shed):
    """No room came up in the longest time a request may wait."""

    reason = "waited_too_long"


class WouldWaitTooLong(Shed):
    """At the pace at which the queue moves its turn would come after the longest time that it may wait."""

    reason = "would_wait_too_long"


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

    def hold(self, placement: Placement, demand: Demand) -> Held:
        """Counts the request against its workers from now on."""
        ...


Policy = Callable[[Demand, Fleet, float], Placement | Reject]
"""Decides where a request runs, given the fleet and the time: `place` with the router's settings."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request says when it asks for its turn.

    Attributes:
        demand: What it needs.
        arrived: When it came to the router, seconds of the loop's clock; a retry keeps its first arrival.
        deadline: When it is to be given up, same clock.
        priority: Higher goes first.
        tenant: Whose it is; room is shared fairly between tenants.
        resumed: Its client has tokens already: it goes before all others and is not shed because the queue is full.
    """

    demand: Demand
    arrived: float
    deadline: float
    priority: int = 0
    tenant: str = ""
    resumed: bool = False


class _Queue:
    """One line and its pace."""

    def __init__(self) -> None:
        self.line: Line[_Turn] = Line()
        self.pace = LinePace()
        self._look_again = 0.0

    def add(self, waiter: Waiter[_Turn], fleet: Fleet, now: float) -> None:
        """Lets one wait."""
        if not len(self.line):
            self.pace.begin(now, fleet.open)
        self.line.add(waiter)

    def remove(self, waiter: Waiter[_Turn], now: float) -> bool:
        """Lets one go; whether it waited."""
        waited = self.line.remove(waiter)
        if waited and not len(self.line):
            self.pace.end(now)
        return waited

    def serve(self, waiter: Waiter[_Turn], now: float) -> None:
        """Its first got room."""
        self.line.serve(waiter)
        self.pace.moved(now)
        if not len(self.line):
            self.pace.end(now)

    def hopeless(self, fleet: Fleet, now: float) -> Iterable[tuple[Waiter[_Turn], int]]:
        """Those whose turn cannot come in time, each with how many are ahead: now and then, and the last few of them.

        Whoever cannot be served takes no turn of those behind it. A stream that goes on is never given up for this.
        """
        if now < self._look_again or not len(self.line):
            return ()
        self._look_again = now + _LOOK_SECONDS
        self.pace.under(fleet.open, now)
        forecast = self.pace.forecast()
        if forecast is None:
            return ()
        found, ahead = deque[tuple[Waiter[_Turn], int]](maxlen=_GIVEN_UP_AT_ONCE), 0
        for waiter in self.line.in_order():
            left = waiter.payload.due - now
            if left > 0 and not waiter.payload.resumed and forecast.in_vain(ahead, left):
                found.append((waiter, ahead))
            else:
                ahead += 1
        return found


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a waiter carries: its request, when it gives up, whether it is in mid-sentence, where its room is put."""

    demand: Demand
    due: float
    resumed: bool
    room: asyncio.Future[Held]


class Admission:
    """The queue.

    Args:
        capacity: Where requests are placed.
        policy: Decides where.
        max_waiting: Requests that may wait at the same time.
        max_wait: Seconds that one request may wait.
    """

    def __init__(
        self, capacity: Capacity, *, policy: Policy = place, max_waiting: int = 1024, max_wait: float = 60.0
    ) -> None:
        self._capacity = capacity
        self._policy = policy
        self._max_waiting = max_waiting
        self._max_wait = max_wait
        self._pairs = _Queue()
        self._decode_only = _Queue()
        self._served_last = self._pairs
        self._arrivals = itertools.count()
        self._unsubscribe = capacity.subscribe(self._serve)

    @property
    def max_wait(self) -> float:
        """Seconds that one request may wait."""
        return self._max_wait

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._pairs.line) + len(self._decode_only.line)

    def close(self) -> None:
        """Stops listening to the fleet; call when nothing waits any more."""
        self._unsubscribe()

    async def acquire(self, claim: Claim) -> Held:
        """Waits for room on a pair of workers; the caller must release what it gets.

        Raises:
            ResourceExhausted: The queue is full, or the request waits too long; `Shed` has the reason.
            Unavailable: No worker that is alive could serve it.
            ContextLengthExceeded: No worker's window is large enough.
            DeadlineExceeded: The deadline came first.
        """
        due = min(claim.deadline, claim.arrived + self._max_wait)
        loop = asyncio.get_running_loop()
        now = loop.time()
        queue = self._pairs if claim.demand.packed_tokens else self._decode_only
        if now >= due:
            raise self._too_late(queue, claim.deadline <= due)
        waiter = self._waiter(claim, due)
        busy = "other requests wait already"
        if not len(queue.line):
            outcome = self._place(waiter, queue)
            if isinstance(outcome, Placement):
                self._served_last = queue
                return self._capacity.hold(outcome, claim.demand)
            if outcome.why is not Why.BUSY:
                raise _refusal(outcome)
            busy = outcome.message
        if not claim.resumed:
            self._shed_early(queue, waiter, due - now, busy)
        timer = loop.call_at(due, self._time_is_up, queue, waiter.payload, claim.deadline <= due)
        try:
            return await self._wait(queue, waiter)
        finally:
            timer.cancel()

    def _waiter(self, claim: Claim, due: float) -> Waiter[_Turn]:
        ttft = claim.demand.slo.ttft
        return Waiter(
            rank=(0 if claim.resumed else 1, -claim.priority),
            urgent_by=due if ttft is None else min(due, claim.arrived + ttft),
            arrival=next(self._arrivals),
            tenant=claim.tenant,
            tokens=claim.demand.total_tokens,
            payload=_Turn(claim.demand, due, claim.resumed, asyncio.get_running_loop().create_future()),
        )

    def _shed_early(self, queue: _Queue, newcomer: Waiter[_Turn], patience: float, busy: str) -> None:
        """Says now what waiting would only say later."""
        ahead = queue.line.ahead(newcomer)
        if queue.pace.wait(ahead) > patience:
            raise _would_wait(queue, ahead, patience)
        if self.waiting >= self._max_waiting and not self._make_room(newcomer):
            raise self._full(queue, busy, ahead)

    def _make_room(self, newcomer: Waiter[_Turn]) -> bool:
        """Sheds who has less of a right to wait than the newcomer, if there is one."""
        tails = [(last, queue) for queue in (self._pairs, self._decode_only) if (last := queue.line.last()) is not None]
        victim, queue = max(tails, key=lambda tail: (tail[0].rank, self._of(tail[0].tenant)))
        has_more = self._of(victim.tenant) > self._of(newcomer.tenant) + 1
        if newcomer.rank > victim.rank or (newcomer.rank == victim.rank and not has_more):
            return False
        _give_up(victim.payload, self._full(queue, "another request goes before this one", len(queue.line)))
        queue.remove(victim, asyncio.get_running_loop().time())
        return True

    def _of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return self._pairs.line.of(tenant) + self._decode_only.line.of(tenant)

    async def _wait(self, queue: _Queue, waiter: Waiter[_Turn]) -> Held:
        turn = waiter.payload
        loop = asyncio.get_running_loop()
        queue.add(waiter, self._capacity.fleet, loop.time())
        # It may have become the first in line, and may fit where the one behind it does not.
        self._serve()
        try:
            return await turn.room
        except asyncio.CancelledError:
            # Admission and cancellation can fall into the same turn of the loop.
            if turn.room.done() and not turn.room.cancelled() and not turn.room.exception():
                turn.room.result().release()
            raise
        finally:
            if queue.remove(waiter, loop.time()):
                self._serve()

    def _serve(self) -> None:
        """Places waiters of both lines, whoever of the two firsts is next, until both have to go on waiting."""
        while any(self._serve_first(queue) for queue in self._in_order()):
            pass
        for queue in (self._pairs, self._decode_only):
            self._give_up_hopeless(queue)

    def _give_up_hopeless(self, queue: _Queue) -> None:
        """Says as soon as it is known what waiting would only say later."""
        now = asyncio.get_running_loop().time()
        for waiter, ahead in queue.hopeless(self._capacity.fleet, now):
            _give_up(waiter.payload, _would_wait(queue, ahead, waiter.payload.due - now))
            queue.remove(waiter, now)

    def _serve_first(self, queue: _Queue) -> bool:
        """Places or refuses the first, if there is one; whether the next may be looked at."""
        waiter = queue.line.first()
        if waiter is None:
            return False
        turn, now = waiter.payload, asyncio.get_running_loop().time()
        if turn.room.done():
            queue.remove(waiter, now)
            return True
        try:
            outcome = self._place(waiter, queue)
        except Exception as exc:
            # A bug is told to the request that shows it; whoever woke the queue goes on.
            queue.remove(waiter, now)
            turn.room.set_exception(exc)
            return True
        if isinstance(outcome, Placement):
            queue.serve(waiter, now)
            self._served_last = queue
            turn.room.set_result(self._capacity.hold(outcome, turn.demand))
        elif outcome.why is Why.BUSY:
            return False
        else:
            queue.remove(waiter, now)
            turn.room.set_exception(_refusal(outcome))
        return True

    def _place(self, waiter: Waiter[_Turn], queue: _Queue) -> Placement | Reject:
        """Where the next of a line can run now, given what the other line's first waits for if that goes before it."""
        fleet, now = self._capacity.fleet, asyncio.get_running_loop().time()
        rival = self._rival(waiter, queue)
        if rival is not None:
            ahead = self._policy(rival.payload.demand, fleet, now)
            if isinstance(ahead, Reject):
                fleet = fleet.without_room_on(ahead.waits_for)
        return self._policy(waiter.payload.demand, fleet, now)

    def _in_order(self) -> tuple[_Queue, _Queue]:
        """The lines, that one first whose first goes before the other's."""
        first = self._pairs.line.first()
        if first is None or self._rival(first, self._pairs) is not None:
            return self._decode_only, self._pairs
        return self._pairs, self._decode_only

    def _rival(self, waiter: Waiter[_Turn], queue: _Queue) -> Waiter[_Turn] | None:
        """The other line's first, if it goes before the next of this one."""
        rival = (self._decode_only if queue is self._pairs else self._pairs).line.first()
        if rival is None:
            return None
        turns = rival.rank == waiter.rank and rival.tenant != waiter.tenant
        return rival if (self._served_last is queue if turns else rival < waiter) else None

    def _time_is_up(self, queue: _Queue, turn: _Turn, deadline_passed: bool) -> None:
        _give_up(turn, self._too_late(queue, deadline_passed))

    def _too_late(self, queue: _Queue, deadline_passed: bool) -> HmaError:
        if deadline_passed:
            return DeadlineExceeded("the deadline passed while the request waited for a worker")
        return WaitedTooLong(
            f"no worker had room within {self._max_wait:g} s", retry_after=_until_moved(queue, len(queue.line))
        )

    def _full(self, queue: _Queue, why: str, ahead: int) -> QueueFull:
        return QueueFull(
            f"the queue is full: {self.waiting} requests wait, --max-waiting allows {self._max_waiting} ({why}); "
            "try again later",
            retry_after=_until_moved(queue, ahead),
        )


def _would_wait(queue: _Queue, ahead: int, patience: float) -> WouldWaitTooLong:
    wait = queue.pace.wait(ahead)
    return WouldWaitTooLong(
        f"{ahead} requests are ahead, about {wait:.0f} s; this one may wait {patience:.0f} s",
        retry_after=_retry_after(wait - patience),
    )


def _until_moved(queue: _Queue, ahead: int) -> float:
    """Seconds after which to come again: until so many that wait now will have had their turn."""
    return _retry_after(queue.pace.guess(ahead, asyncio.get_running_loop().time()))


def _retry_after(wait: float) -> float:
    return min(max(wait, _RETRY_WHEN_FULL), _LONGEST_RETRY)


def _give_up(turn: _Turn, error: HmaError) -> None:
    if not turn.room.done():
        turn.room.set_exception(error)


def _refusal(reject: Reject) -> HmaError:
    if reject.why is Why.TOO_LONG:
        return ContextLengthExceeded(reject.message, field="max_tokens")
    return Unavailable(reject.message, retry_after=_RETRY_WHEN_NOBODY)
