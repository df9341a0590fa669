"""The two lines, one for prompts that need a prefill worker: neither holds the other up nor starves it."""

from __future__ import annotations

import asyncio

import pytest

from hma_serve.core.errors import DeadlineExceeded
from hma_serve.router.admission import Admission, Claim
from hma_serve.router.fleet import Load
from hma_serve.router.placement import Demand
from support.admission import LATER, LONG, SHORT, Room, acquire, settle
from support.virtual_loop import START, virtual


@virtual
async def test_a_full_prefill_pool_does_not_hold_up_short_prompts() -> None:
    room = Room(5)
    room.prefill_full = True
    admission = Admission(room)
    long = acquire(admission, LONG)
    await settle()
    assert (await acquire(admission, SHORT)).placement.prefill is None
    assert not long.done()
    room.prefill_full = False
    room.changed()
    assert (await long).placement.prefill == room.prefill


@pytest.mark.parametrize("large", [Demand(100, 100), Demand(10, 190)])
@pytest.mark.parametrize("small", [Demand(10, 50), Demand(40, 20)])
@pytest.mark.parametrize("tenant", ["", "another"])
@virtual
async def test_small_requests_do_not_take_the_memory_that_a_large_one_waits_for(
    large: Demand, small: Demand, tenant: str
) -> None:
    room = Room(9)
    room.load = Load(kv_capacity_tokens=256, kv_free_tokens=256)
    admission = Admission(room, max_wait=5)
    loop = asyncio.get_running_loop()

    async def served(demand: Demand, tenant: str = "") -> float:
        arrived = loop.time()
        held = await admission.acquire(Claim(demand, arrived, LATER, tenant=tenant))
        waited = loop.time() - arrived
        await asyncio.sleep(1)
        held.release()
        return waited

    # Two to three of them at any time, and four would fit: there is always somebody who holds a part of the memory.
    tasks = []
    for number in range(30):
        tasks.append(asyncio.create_task(served(small, tenant)))
        if number == 5:
            tasks.append(asyncio.create_task(served(large)))
        await asyncio.sleep(0.4)
    assert max(await asyncio.gather(*tasks)) <= 2


@virtual
async def test_who_waits_for_decode_goes_before_the_other_line_only_if_it_ranks_before_it() -> None:
    room = Room(9)
    room.load = Load(running=1, kv_capacity_tokens=160, kv_free_tokens=80)
    admission = Admission(room)
    large = acquire(admission, Demand(100, 1))
    await settle()
    (await acquire(admission, SHORT, priority=1)).release()
    behind = acquire(admission, SHORT)
    await settle()
    assert not behind.done()
    large.cancel()
    await behind


@pytest.mark.parametrize("leaves", [True, False])
@virtual
async def test_when_the_first_in_line_leaves_or_gives_up_the_next_is_served(leaves: bool) -> None:
    room = Room(1)
    room.load = Load(running=1, kv_capacity_tokens=160, kv_free_tokens=80)
    admission = Admission(room)
    large = acquire(admission, Demand(100, 1), deadline=START + 5)
    small = acquire(admission, Demand(33, 1))
    await settle()
    assert admission.waiting == 2
    if leaves:
        large.cancel()
    with pytest.raises(asyncio.CancelledError if leaves else DeadlineExceeded):
        await large
    assert (await small).placement.prefill is not None


@virtual
async def test_both_lines_take_turns_where_decode_is_what_they_wait_for() -> None:
    admission = Admission(Room(1))
    seat = await acquire(admission)
    waiters = [acquire(admission, demand) for demand in (SHORT, LONG, LONG, SHORT, LONG)]
    await settle()
    for waiter in waiters:
        seat.release()
        seat = await waiter
    seat.release()
