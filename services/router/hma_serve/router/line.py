"""The order in which requests wait: who is next when room comes up.

First those that go on after a worker was lost (their client is in mid-sentence), then by priority, then fair between
tenants, then by the earliest deadline, then by arrival. Fair means: of the tenants that wait, the one that got the
least work so far is next, work being counted in tokens and only while there is a queue. A tenant that comes new starts
level with the others, so nobody saves up; one tenant alone is served by deadline.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass(order=True, slots=True)
class Waiter(Generic[Payload]):
    """A request in line; ordered as within one tenant.

    Attributes:
        rank: Lower goes first, whosever it is.
        urgent_by: When it should be placed, seconds of any one clock.
        arrival: Its number.
        tenant: Whose it is.
        tokens: What it costs.
        payload: The line's user's.
    """

    rank: tuple[int, int]
    urgent_by: float
    arrival: int
    tenant: str = field(compare=False)
    tokens: int = field(compare=False)
    payload: Payload = field(compare=False)


def _turn(waiter: Waiter[Payload], spent: Mapping[str, int]) -> tuple[tuple[int, int], int, float, int]:
    return waiter.rank, spent[waiter.tenant], waiter.urgent_by, waiter.arrival


def _rank(waiter: Waiter[Payload]) -> tuple[int, int]:
    return waiter.rank


class Line(Generic[Payload]):
    """Waiters, and the one that is next; bounded by whoever adds them."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Waiter[Payload]]] = {}
        self._spent: dict[str, int] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, waiter: Waiter[Payload]) -> None:
        """Puts a waiter in line."""
        if waiter.tenant not in self._waiting:
            self._waiting[waiter.tenant] = []
            self._spent[waiter.tenant] = max(self._spent.get(waiter.tenant, 0), self._level())
        insort(self._waiting[waiter.tenant], waiter)
        self._length += 1

    def first(self) -> Waiter[Payload] | None:
        """The one that is next; None when nobody waits."""
        heads = (waiters[0] for waiters in self._waiting.values())
        return min(heads, key=lambda waiter: _turn(waiter, self._spent), default=None)

    def in_order(self) -> Iterator[Waiter[Payload]]:
        """All of them as they will be served if nobody comes or leaves; the line must not change meanwhile."""
        spent = dict(self._spent)
        left = {tenant: iter(waiters[1:]) for tenant, waiters in self._waiting.items()}
        heads = [(_turn(waiters[0], spent), waiters[0]) for waiters in self._waiting.values()]
        heapq.heapify(heads)
        while heads:
            waiter = heads[0][1]
            yield waiter
            spent[waiter.tenant] += waiter.tokens
            following = next(left[waiter.tenant], None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (_turn(following, spent), following))

    def last(self) -> Waiter[Payload] | None:
        """The one that makes room in a full line: of the lowest rank, of who has most there, the last."""
        tails = (waiters[-1] for waiters in self._waiting.values())
        return max(tails, key=lambda waiter: (waiter.rank, self.of(waiter.tenant), waiter.urgent_by), default=None)

    def of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return len(self._waiting.get(tenant, ()))

    def ahead(self, waiter: Waiter[Payload]) -> int:
        """How many may be served before a waiter that is not in line.

        All of its own tenant and rank count, because others that come may be as urgent; tenants take equal turns.
        """
        better, equal = self._counts(waiter.tenant, waiter.rank)
        before, turns = better + equal, equal + 1
        for tenant in self._waiting.keys() - {waiter.tenant}:
            better, equal = self._counts(tenant, waiter.rank)
            before += better + min(equal, turns)
        return before

    def serve(self, waiter: Waiter[Payload]) -> None:
        """Takes a waiter out because it got its room."""
        self._spent[waiter.tenant] += waiter.tokens
        self.remove(waiter)

    def remove(self, waiter: Waiter[Payload]) -> bool:
        """Takes a waiter out; whether it was there."""
        waiters = self._waiting.get(waiter.tenant, [])
        position = bisect_left(waiters, waiter)
        if position == len(waiters) or waiters[position] is not waiter:
            return False
        del waiters[position]
        self._length -= 1
        if not waiters:
            del self._waiting[waiter.tenant]
            self._forget()
        return True

    def _counts(self, tenant: str, rank: tuple[int, int]) -> tuple[int, int]:
        """How many of a tenant have a better rank, and how many this one."""
        waiters = self._waiting.get(tenant, [])
        better = bisect_left(waiters, rank, key=_rank)
        return better, bisect_right(waiters, rank, key=_rank) - better

    def _level(self) -> int:
        """What the least served of those who wait got; new ones start there."""
        others = [self._spent[tenant] for tenant, waiters in self._waiting.items() if waiters]
        return min(others, default=0)

    def _forget(self) -> None:
        """Drops the accounts of absent tenants that would start level anyway; all of them when nobody waits."""
        level = self._level()
        self._spent = {
            tenant: spent
            for tenant, spent in self._spent.items()
            if tenant in self._waiting or (self._waiting and spent > level)
        }
