"""Room is shared fairly between tenants, whatever their requests cost."""

from __future__ import annotations

import asyncio

import pytest

from hma_serve.router.admission import Admission, Claim, Held, QueueFull
from hma_serve.router.placement import Demand
from support.admission import LATER, LONG, SHORT, Room, acquire, settle
from support.virtual_loop import START, virtual


@virtual
async def test_tenants_get_equal_work_and_deadlines_decide_within_one() -> None:
    admission = Admission(Room(1))
    first = await acquire(admission)
    order: list[str] = []

    async def queued(tenant: str, deadline: float, tokens: int) -> None:
        held = await admission.acquire(Claim(Demand(tokens, 10), START, START + deadline, tenant=tenant))
        order.append(f"{tenant}{deadline:.0f}")
        held.release()

    greedy = [asyncio.create_task(queued("a", 20 + number, 90)) for number in range(4)]
    modest = [asyncio.create_task(queued("b", 50 - number, 40)) for number in range(6)]
    await settle()
    first.release()
    await asyncio.gather(*greedy, *modest)
    assert order == ["a20", "b45", "b46", "a21", "b47", "b48", "a22", "b49", "b50", "a23"]


@virtual
async def test_a_tenant_that_comes_late_starts_level() -> None:
    room = Room(1)
    admission = Admission(room)
    held = await acquire(admission)
    order: list[str] = []

    async def queued(tenant: str) -> None:
        seat = await admission.acquire(Claim(SHORT, START, LATER, tenant=tenant))
        order.append(tenant)
        if order == ["a", "a"]:
            tasks.extend(asyncio.create_task(queued("b")) for _ in range(3))
            await settle()
        seat.release()

    tasks = [asyncio.create_task(queued("a")) for _ in range(5)]
    await settle()
    held.release()
    await asyncio.gather(*tasks)
    await asyncio.gather(*tasks)
    assert order == ["a", "a", "a", "b", "a", "b", "a", "b"]


@virtual
async def test_tenants_take_turns_between_the_lines() -> None:
    admission = Admission(Room(1))
    seat = await acquire(admission)
    order: list[str] = []

    async def queued(tenant: str, demand: Demand) -> None:
        held = await admission.acquire(Claim(demand, START, LATER, tenant=tenant))
        order.append(tenant)
        held.release()

    requests = [("greedy", LONG)] * 4 + [("modest", SHORT)] * 2
    tasks = [asyncio.create_task(queued(*request)) for request in requests]
    await settle()
    seat.release()
    await asyncio.gather(*tasks)
    assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy"]


def queue_up(admission: Admission, tenant: str, *, priority: int = 0) -> asyncio.Task[Held]:
    claim = Claim(SHORT, START, LATER, priority=priority, tenant=tenant)
    return asyncio.create_task(admission.acquire(claim))


@virtual
async def test_a_tenant_that_fills_the_queue_leaves_others_their_part() -> None:
    admission = Admission(Room(1), max_waiting=4)
    seat = await acquire(admission)
    greedy = [queue_up(admission, "greedy") for _ in range(4)]
    await settle()
    modest = [queue_up(admission, "modest") for _ in range(3)]
    await settle()
    # Two each: nobody takes a place only to have as many as the other had.
    with pytest.raises(QueueFull):
        await modest[2]
    for shed in greedy[2:]:
        with pytest.raises(QueueFull, match="another request goes before this one"):
            await shed
    assert admission.waiting == 4
    for waiter in (greedy[0], modest[0], greedy[1], modest[1]):
        seat.release()
        seat = await waiter
    assert admission.waiting == 0
