"""A queue in front of a fleet of a few seats, for tests on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from hma_serve.core.worker import WorkerRole
from hma_serve.router.admission import Admission, Claim, Held
from hma_serve.router.fleet import Fleet, Load, WorkerView
from hma_serve.router.placement import Demand, Placement
from support.fake_workers import fake_worker
from support.virtual_loop import START

LATER = 1e6
SHORT, LONG = Demand(10, 10), Demand(100, 10)


class Seat:
    def __init__(self, room: Room, placement: Placement, kv_tokens: int) -> None:
        self.placement = placement
        self._room = room
        self._kv_tokens = kv_tokens
        self._taken = True

    def release_prefill(self) -> None:
        pass

    def release(self) -> None:
        if self._taken:
            self._taken = False
            self._room.taken -= 1
            self._room.kv_tokens -= self._kv_tokens
            self._room.changed()


class Room:
    """A fleet of one decode (and maybe one prefill) with so many seats."""

    def __init__(self, seats: int, *, prefill: bool = True) -> None:
        self.seats = seats
        self.taken = 0
        self.kv_tokens = 0
        self.decode = fake_worker(WorkerRole.DECODE, instance="d", max_running=1000)
        self.prefill = fake_worker(WorkerRole.PREFILL, instance="p", max_running=1000) if prefill else None
        self.prefill_full = False
        self.away_since: float | None = None
        self.load = Load()
        self.listeners: list[Callable[[], None]] = []

    @property
    def fleet(self) -> Fleet:
        full = self.taken >= self.seats
        load = replace(
            self.load,
            running=self.load.running + self.taken,
            kv_free_tokens=self.load.kv_free_tokens - self.kv_tokens,
        )
        decode = WorkerView(self.decode, load, LATER, away_since=self.away_since, refused=full)
        if self.prefill is None:
            return Fleet(decodes=(decode,))
        return Fleet((WorkerView(self.prefill, Load(), LATER, refused=self.prefill_full),), (decode,))

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def hold(self, placement: Placement, demand: Demand) -> Held:
        kv_tokens = demand.kv_tokens(placement.decode.limits)
        self.taken += 1
        self.kv_tokens += kv_tokens
        assert self.taken <= self.seats
        return Seat(self, placement, kv_tokens)

    def changed(self) -> None:
        for listener in self.listeners:
            listener()


def acquire(
    admission: Admission, demand: Demand = SHORT, *, deadline: float = LATER, priority: int = 0, arrived: float = START
) -> asyncio.Task[Held]:
    return asyncio.create_task(admission.acquire(Claim(demand, arrived, deadline, priority)))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)
