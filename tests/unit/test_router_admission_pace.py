"""Bursts on a fleet: what its pace says of those who come, and of those who wait already."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hma_serve.core.worker import WorkerRole
from hma_serve.router.admission import Admission, Claim, Shed
from hma_serve.router.line import Line, Waiter
from support.admission import LATER, SHORT, Room, acquire, settle
from support.fake_workers import fake_worker
from support.virtual_loop import START, virtual

MAX_WAIT = 60.0
REPORTS = 0.5


@dataclass(frozen=True)
class End:
    """Of a request: the reason for which it was shed, or "served", after how many seconds, and when to come again."""

    reason: str
    after: float
    retry_after: float | None = None


class Users:
    """They send requests to a fleet of so many seats; `service` is how long one is served, given its number."""

    def __init__(self, seats: int, service: Callable[[int], float]) -> None:
        self.room = Room(seats)
        self.admission = Admission(self.room, max_wait=MAX_WAIT)
        self.served = 0
        self._service = service

    async def burst(self, requests: int) -> list[End]:
        """Sends so many at once, and waits for the last to be served or shed."""
        asyncio.get_running_loop().call_later(REPORTS, self._report)
        return await asyncio.gather(*(self._ask() for _ in range(requests)))

    async def _ask(self) -> End:
        loop = asyncio.get_running_loop()
        came = loop.time()
        try:
            held = await self.admission.acquire(Claim(SHORT, came, LATER))
        except Shed as shed:
            return End(shed.reason, loop.time() - came, shed.retry_after)
        self.served += 1
        loop.call_later(self._service(self.served), held.release)
        return End("served", loop.time() - came)

    def _report(self) -> None:
        """A worker says that it is there, whatever changed."""
        self.room.changed()
        if self.admission.waiting:
            asyncio.get_running_loop().call_later(REPORTS, self._report)


def those(ends: list[End], reason: str) -> list[float]:
    return [end.after for end in ends if end.reason == reason]


@virtual
async def test_most_who_wait_in_vain_are_told_long_before_the_end() -> None:
    users = Users(8, lambda _: 4.1)
    ends = await users.burst(300)
    assert len(those(ends, "served")) == 8 * 15
    told = those(ends, "would_wait_too_long")
    assert len(told) > 150
    assert sum(after < MAX_WAIT / 2 for after in told) > 100
    assert all(end.retry_after is not None and 1 <= end.retry_after <= 60 for end in ends if end.reason != "served")


@virtual
async def test_the_next_burst_begins_with_the_pace_of_the_last() -> None:
    users = Users(8, lambda _: 4.1)
    await users.burst(300)
    await asyncio.sleep(12)
    assert users.admission.waiting == users.room.taken == 0
    ends = await users.burst(300)
    assert len(those(ends, "served")) == 8 * 15
    assert those(ends, "would_wait_too_long").count(0) > 100


@pytest.mark.parametrize("seed", range(6))
@virtual
async def test_nobody_is_given_up_who_would_be_served_in_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(seed)
    kinds: list[Callable[[], float]] = [
        lambda: numbers.expovariate(1 / 5),
        lambda: numbers.uniform(10, 20),
        lambda: min(60.0, numbers.paretovariate(1.2)),
    ]
    services = [kinds[seed % 3]() for _ in range(1000)]
    ends = await Users(32, services.__getitem__).burst(900)
    assert len(those(ends, "would_wait_too_long")) > 50
    monkeypatch.setattr("hma_serve.router.admission._GIVEN_UP_AT_ONCE", 0)
    patient = await Users(32, services.__getitem__).burst(900)
    assert not those(patient, "would_wait_too_long")
    assert len(those(ends, "served")) == len(those(patient, "served"))


@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_short_requests_behind_long_ones_are_not_judged_by_these(seed: int) -> None:
    numbers = random.Random(seed)
    ends = await Users(64, lambda number: numbers.uniform(10, 40) if number <= 64 else 2.0).burst(900)
    assert len(those(ends, "served")) == 900


@pytest.mark.parametrize("seconds_or_worker", [181.0, "another"])
@virtual
async def test_a_pace_is_forgotten_after_minutes_and_when_the_fleet_changed(seconds_or_worker: float | str) -> None:
    users = Users(8, lambda _: 4.1)
    await users.burst(300)
    await asyncio.sleep(12)
    if isinstance(seconds_or_worker, str):
        users.room.decode = fake_worker(WorkerRole.DECODE, instance=seconds_or_worker, max_running=1000)
    else:
        await asyncio.sleep(seconds_or_worker)
    assert not those(await users.burst(300), "would_wait_too_long").count(0)


@virtual
async def test_short_lines_do_not_keep_an_old_pace() -> None:
    users = Users(8, lambda _: 4.1)
    await users.burst(300)
    for _ in range(20):
        await asyncio.sleep(10)
        await users.burst(9)
    await asyncio.sleep(10)
    assert not those(await users.burst(300), "would_wait_too_long").count(0)


@virtual
async def test_a_worker_that_joins_stops_the_judging_until_the_pace_is_known_again() -> None:
    users = Users(4, lambda _: 2.0)

    def join() -> None:
        users.room.seats = 64
        users.room.decode = fake_worker(WorkerRole.DECODE, instance="larger", max_running=1000)
        users.room.changed()

    asyncio.get_running_loop().call_later(14, join)
    ends = await users.burst(800)
    assert len(those(ends, "served")) == 800


@virtual
async def test_streams_that_go_on_and_higher_priorities_are_not_given_up_for_the_pace() -> None:
    loop = asyncio.get_running_loop()
    admission = Admission(Room(1), max_wait=MAX_WAIT)
    seat = await acquire(admission)

    def ask(count: int, *, tenant: str = "", priority: int = 0, resumed: bool = False) -> list[asyncio.Task[object]]:
        claim = Claim(SHORT, START, LATER, priority=priority, tenant=tenant, resumed=resumed)
        return [asyncio.create_task(hold(claim)) for _ in range(count)]

    async def hold(claim: Claim) -> object:
        held = await admission.acquire(claim)
        loop.call_later(1, held.release)
        return held

    greedy = ask(200, tenant="greedy")
    modest = ask(15, tenant="modest")
    urgent = ask(5, priority=1)
    await settle()
    seat.release()
    await asyncio.sleep(35)
    moving = ask(30, resumed=True)
    await asyncio.sleep(START + MAX_WAIT - loop.time() + 1)
    failures = [task.exception() for task in (*modest, *urgent, *moving)]
    assert [str(failure) for failure in failures if failure] == ["no worker had room within 60 s"] * 5
    assert len([task for task in greedy if "are ahead" in str(task.exception())]) > 100


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.sampled_from("abc"), st.integers(1, 99)), max_size=40),
    st.integers(0, 20),
)
def test_the_order_foretold_is_the_order_served(asked: list[tuple[int, int, str, int]], before: int) -> None:
    line: Line[None] = Line()
    for number, (rank, urgent_by, tenant, tokens) in enumerate(asked):
        line.add(Waiter((1, -rank), float(urgent_by), number, tenant, tokens, None))
    for _ in range(min(before, len(asked))):
        first = line.first()
        assert first is not None
        line.serve(first)
    foretold = list(line.in_order())
    served = []
    while (first := line.first()) is not None:
        served.append(first)
        line.serve(first)
    assert foretold == served
