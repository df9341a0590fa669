"""The queue, on virtual time: nothing here waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from hma_serve.core.errors import ContextLengthExceeded, DeadlineExceeded, Unavailable
from hma_serve.core.worker import WorkerRole
from hma_serve.router.admission import Admission, Claim, Held, QueueFull, Shed, WaitedTooLong, WouldWaitTooLong
from hma_serve.router.fleet import Fleet, Load, WorkerView
from hma_serve.router.placement import RECOVERY_SECONDS, Demand, Placement, Reject, place
from support.fake_workers import WINDOW, fake_worker
from support.virtual_loop import START, virtual

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


@virtual
async def test_a_full_queue_sheds_with_a_reason_and_a_time() -> None:
    admission = Admission(Room(1), max_waiting=1)
    first = await acquire(admission)
    second = acquire(admission)
    await settle()
    with pytest.raises(QueueFull, match="queue is full") as raised:
        await acquire(admission)
    assert raised.value.reason == "queue_full"
    assert raised.value.retry_after is not None
    first.release()
    await second


@virtual
async def test_waiting_has_an_end() -> None:
    admission = Admission(Room(0), max_wait=60)
    with pytest.raises(WaitedTooLong) as raised:
        await acquire(admission)
    assert isinstance(raised.value, Shed)
    assert asyncio.get_running_loop().time() == pytest.approx(START + 60)
    assert admission.waiting == 0


@virtual
async def test_the_requests_own_deadline_comes_first() -> None:
    admission = Admission(Room(0), max_wait=60)
    with pytest.raises(DeadlineExceeded):
        await acquire(admission, deadline=START + 5)
    assert asyncio.get_running_loop().time() == pytest.approx(START + 5)


@virtual
async def test_a_retry_keeps_its_first_arrival() -> None:
    admission = Admission(Room(1), max_wait=60)
    with pytest.raises(WaitedTooLong):
        await acquire(admission, arrived=START - 60)


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
async def test_both_lines_take_turns_where_decode_is_what_they_wait_for() -> None:
    admission = Admission(Room(1))
    seat = await acquire(admission)
    waiters = [acquire(admission, demand) for demand in (SHORT, LONG, LONG, SHORT, LONG)]
    await settle()
    for waiter in waiters:
        seat.release()
        seat = await waiter
    seat.release()


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


@virtual
async def test_a_higher_priority_takes_a_place_in_a_full_queue_and_an_equal_one_does_not() -> None:
    admission = Admission(Room(1), max_waiting=2)
    seat = await acquire(admission)
    moving = asyncio.create_task(admission.acquire(Claim(SHORT, START, LATER, resumed=True)))
    await settle()
    low, same, high = (acquire(admission, priority=priority) for priority in (0, 0, 1))
    with pytest.raises(QueueFull):
        await same
    with pytest.raises(QueueFull):
        await low
    # Who is in mid-sentence is displaced by nobody.
    higher = acquire(admission, priority=2)
    with pytest.raises(QueueFull):
        await high
    highest = acquire(admission, demand=LONG, priority=3)
    with pytest.raises(QueueFull):
        await higher
    for waiter in (moving, highest):
        seat.release()
        seat = await waiter
    assert admission.waiting == 0


@virtual
async def test_who_would_be_served_in_time_is_not_refused_for_others_that_wait_behind_it() -> None:
    loop = asyncio.get_running_loop()
    admission = Admission(Room(1), max_wait=30)

    def ask(tenant: str, priority: int = 0) -> asyncio.Task[Held]:
        now = loop.time()
        return asyncio.create_task(admission.acquire(Claim(SHORT, now, now + 30, priority=priority, tenant=tenant)))

    seat = await ask("greedy")
    waiters = [ask("greedy") for _ in range(10)]
    await settle()
    for waiter in waiters[:9]:
        await asyncio.sleep(2)
        seat.release()
        seat = await waiter
    rest = [waiters[9], *(ask("greedy") for _ in range(15))]
    await settle()
    with pytest.raises(WouldWaitTooLong):
        await ask("greedy")
    welcome = [ask("modest"), ask("greedy", priority=1)]
    await settle()
    assert admission.waiting == len(rest) + 2
    for task in (*rest, *welcome):
        task.cancel()
    await asyncio.gather(*rest, *welcome, return_exceptions=True)
    seat.release()


@virtual
async def test_what_would_wait_too_long_is_told_so_at_once() -> None:
    loop = asyncio.get_running_loop()
    room = Room(1)
    admission = Admission(room, max_wait=30)
    seat = await acquire(admission)
    waiters: list[asyncio.Task[Held]] = []
    for _ in range(10):
        waiters.append(acquire(admission, arrived=loop.time()))
    await settle()
    for waiter in waiters[:9]:
        await asyncio.sleep(2)
        seat.release()
        seat = await waiter
    waiters += [acquire(admission, arrived=loop.time()) for _ in range(15)]
    await settle()
    with pytest.raises(WouldWaitTooLong, match="16 requests are ahead, about 32 s; this one may wait 30 s") as raised:
        await acquire(admission, arrived=loop.time())
    assert raised.value.reason == "would_wait_too_long"
    assert raised.value.retry_after == pytest.approx(2)
    # Its own deadline may be nearer than the longest wait.
    with pytest.raises(WouldWaitTooLong):
        await acquire(admission, deadline=loop.time() + 10, arrived=loop.time())
    for waiter in waiters[9:]:
        seat.release()
        seat = await waiter


@virtual
async def test_a_pace_is_learnt_anew_each_time_that_a_line_forms() -> None:
    room = Room(1)
    admission = Admission(room, max_wait=30)
    for pause in (5.0, 0.1):
        arrived = asyncio.get_running_loop().time()
        seat = await acquire(admission, arrived=arrived)
        waiters = [acquire(admission, arrived=arrived) for _ in range(20)]
        for waiter in waiters:
            await asyncio.sleep(pause / 20)
            seat.release()
            seat = await waiter
        seat.release()
    assert admission.waiting == 0
