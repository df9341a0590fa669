"""Who is told to come back later, when, and with what reason."""

from __future__ import annotations

import asyncio

import pytest

from hma_serve.core.errors import DeadlineExceeded
from hma_serve.router.admission import Admission, Claim, Held, QueueFull, Shed, WaitedTooLong, WouldWaitTooLong
from support.admission import LATER, LONG, SHORT, Room, acquire, settle
from support.virtual_loop import START, virtual


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
async def test_the_pace_of_batches_that_end_together_is_that_of_the_batches() -> None:
    """64 at once every 15 s are one in 0.23 s, not 63 in no time."""
    loop = asyncio.get_running_loop()
    admission = Admission(Room(64), max_wait=60)
    seats = await asyncio.gather(*(acquire(admission, arrived=loop.time()) for _ in range(64)))
    waiters = [acquire(admission, arrived=loop.time()) for _ in range(128)]
    await settle()
    await asyncio.sleep(15)
    for seat in seats:
        seat.release()
    seats = await asyncio.gather(*waiters[:64])
    waiters = waiters[64:] + [acquire(admission, arrived=loop.time()) for _ in range(192)]
    await settle()
    with pytest.raises(WouldWaitTooLong, match="256 requests are ahead, about 60 s") as raised:
        await acquire(admission, deadline=loop.time() + 50, arrived=loop.time())
    assert raised.value.retry_after == pytest.approx(10)
    for seat in seats:
        seat.release()
    for waiter in waiters:
        (await waiter).release()


@virtual
async def test_who_waited_in_vain_is_told_how_long_the_others_will() -> None:
    loop = asyncio.get_running_loop()
    admission = Admission(Room(1), max_wait=60)
    seat = await acquire(admission, arrived=loop.time())
    early = [acquire(admission, arrived=loop.time()) for _ in range(3)]
    await settle()
    late = [acquire(admission, arrived=loop.time()) for _ in range(2)]
    for waiter in early:
        await asyncio.sleep(15)
        seat.release()
        seat = await waiter
    # Three got room in 60 s, and the fourth is to come at any moment: two will in 30 s.
    for waiter in late:
        with pytest.raises(WaitedTooLong, match="no worker had room within 60 s") as raised:
            await waiter
        assert raised.value.retry_after == pytest.approx(30)
    seat.release()


@virtual
async def test_a_full_queue_says_how_full_it_is_and_when_it_will_have_moved() -> None:
    admission = Admission(Room(1), max_waiting=2)
    seat = await acquire(admission)
    waiting = [acquire(admission) for _ in range(2)]
    await settle()
    for seconds in (0, 10):
        await asyncio.sleep(seconds)
        with pytest.raises(QueueFull, match="2 requests wait, --max-waiting allows 2") as raised:
            await acquire(admission)
        assert raised.value.retry_after == pytest.approx(max(1, 2 * seconds))
    await asyncio.sleep(40)
    with pytest.raises(QueueFull) as raised:
        await acquire(admission)
    assert raised.value.retry_after == 60
    for waiter in waiting:
        seat.release()
        seat = await waiter
