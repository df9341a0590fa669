"""Waiting for room, on virtual time: nothing here waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hma_serve.core.errors import ContextLengthExceeded, Unavailable
from hma_serve.router.admission import Admission, Claim
from hma_serve.router.fleet import Fleet
from hma_serve.router.placement import RECOVERY_SECONDS, Demand, Placement, Reject, place
from support.admission import LATER, LONG, SHORT, Room, acquire, settle
from support.fake_workers import WINDOW
from support.virtual_loop import START, virtual


@virtual
async def test_room_is_given_at_once() -> None:
    admission = Admission(Room(1))
    held = await admission.acquire(Claim(LONG, START, LATER))
    assert held.placement.packed_tokens == 96
    assert admission.waiting == 0


@virtual
async def test_a_release_lets_the_next_in() -> None:
    admission = Admission(Room(1))
    first = await acquire(admission)
    second = acquire(admission)
    await settle()
    assert admission.waiting == 1
    first.release()
    (await second).release()
    assert admission.waiting == 0


@virtual
async def test_the_earliest_deadline_goes_first_and_priority_before_that() -> None:
    room = Room(1)
    admission = Admission(room)
    first = await acquire(admission)
    order: list[str] = []

    async def queued(name: str, deadline: float, priority: int) -> None:
        held = await admission.acquire(Claim(SHORT, START, deadline, priority))
        order.append(name)
        held.release()

    tasks = [
        asyncio.create_task(queued("late", START + 30, 0)),
        asyncio.create_task(queued("early", START + 20, 0)),
        asyncio.create_task(queued("early too", START + 20, 0)),
        asyncio.create_task(queued("important", START + 40, 1)),
    ]
    await settle()
    first.release()
    await asyncio.gather(*tasks)
    assert order == ["important", "early", "early too", "late"]


@virtual
async def test_a_request_that_placement_fails_on_takes_nobody_with_it() -> None:
    """Who tells of room follows a worker's load: an error there would end that for good."""
    broken = Demand(20, 7)

    def policy(demand: Demand, fleet: Fleet, now: float) -> Placement | Reject:
        if demand is broken and not room.taken:
            raise ZeroDivisionError
        return place(demand, fleet, now)

    room = Room(1)
    admission = Admission(room, policy=policy)
    first = await acquire(admission)
    failing, behind = acquire(admission, broken), acquire(admission)
    await settle()
    first.release()
    with pytest.raises(ZeroDivisionError):
        await failing
    (await behind).release()
    assert admission.waiting == 0


@virtual
async def test_nobody_overtakes_the_first_in_line() -> None:
    room = Room(2)
    admission = Admission(room)
    held = [await acquire(admission), await acquire(admission)]
    waiting = acquire(admission)
    await settle()
    room.taken -= 1  # room that no change has announced yet
    newcomer = acquire(admission, deadline=LATER)
    await settle()
    assert waiting.done()
    assert not newcomer.done()
    held[0].release()
    await newcomer


@virtual
async def test_a_fleet_that_cannot_serve_is_unavailable_not_overloaded() -> None:
    room = Room(1)
    room.away_since = START - RECOVERY_SECONDS
    with pytest.raises(Unavailable) as raised:
        await acquire(Admission(room))
    assert raised.value.retry_after is not None


@virtual
async def test_those_who_wait_for_a_lost_worker_give_up_when_it_stays_away() -> None:
    room = Room(1)
    room.away_since = START
    tasks = [acquire(Admission(room), demand) for demand in (SHORT, LONG)]
    await settle()
    assert not any(task.done() for task in tasks)
    asyncio.get_running_loop().call_later(RECOVERY_SECONDS + 1, room.changed)
    for task in tasks:
        with pytest.raises(Unavailable):
            await task


@virtual
async def test_a_request_too_long_for_every_worker_fails_at_once() -> None:
    with pytest.raises(ContextLengthExceeded):
        await acquire(Admission(Room(0)), replace(SHORT, max_tokens=WINDOW))


@virtual
async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    admission = Admission(Room(1))
    first = await acquire(admission)
    gone, next_one = acquire(admission, deadline=START + 9), acquire(admission)
    await settle()
    gone.cancel()
    await settle()
    assert admission.waiting == 1
    first.release()
    await next_one


@virtual
async def test_admission_and_cancellation_in_one_turn_leak_nothing() -> None:
    room = Room(1)
    admission = Admission(room)
    first = await acquire(admission)
    unlucky = acquire(admission)
    await settle()
    first.release()
    unlucky.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unlucky
    assert room.taken == 0


@virtual
async def test_closing_stops_listening() -> None:
    room = Room(1)
    admission = Admission(room)
    admission.close()
    assert room.listeners == []


@virtual
async def test_a_stream_that_goes_on_elsewhere_waits_in_front_even_of_a_full_queue() -> None:
    admission = Admission(Room(1), max_waiting=1)
    first = await acquire(admission)
    waiting = acquire(admission, priority=9)
    await settle()
    moving = asyncio.create_task(admission.acquire(Claim(SHORT, START, LATER, resumed=True)))
    await settle()
    assert admission.waiting == 2
    first.release()
    (await moving).release()
    (await waiting).release()
