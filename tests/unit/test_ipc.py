import asyncio
import os
import socket
import sys

import pytest

from hma_serve.core.errors import FailedPrecondition
from hma_serve.ipc import Arena, AsyncLink, LinkClosed, SlotPool, SyncLink, SyncLinks, spawn_engine
from hma_serve.ipc.link import MAX_MESSAGE
from hma_serve.v1.common_pb2 import TokenIds


def test_both_mappings_of_an_arena_show_the_same_bytes() -> None:
    with Arena.create(slots=3, slot_bytes=4096) as ours, Arena.attach(os.dup(ours.fd), 3, 4096) as theirs:
        ours.slot(1)[:5] = b"hello"
        assert bytes(theirs.slot(1, 5)) == b"hello"
        assert bytes(theirs.slot(0, 5)) == bytes(5)


@pytest.mark.parametrize(("index", "length"), [(3, 1), (-1, 1), (0, 4097), (0, -1)])
def test_an_arena_refuses_what_lies_outside(index: int, length: int) -> None:
    with Arena.create(slots=3, slot_bytes=4096) as arena, pytest.raises(IndexError):
        arena.slot(index, length)


@pytest.mark.parametrize("slots", [1 << 40, 1 << 60])
def test_more_memory_than_there_can_be_is_refused(slots: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FailedPrecondition, match=f"cannot share {slots} buffers"):
        Arena.create(slots, 1 << 21)
    assert len(os.listdir("/proc/self/fd")) == files


async def test_slots_are_handed_out_in_turn_and_never_lost() -> None:
    pool = SlotPool(2)
    assert {await pool.acquire(), await pool.acquire()} == {0, 1}
    assert pool.try_acquire() is None
    first, second = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    assert pool.statistics().waiting == 2
    pool.release(1)
    first.cancel()  # after it was given the slot, before it ran
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == 1
    pool.release(0)
    with pytest.raises(ValueError, match="not taken"):
        pool.release(0)
    assert pool.statistics().free == 1


def pair() -> tuple[AsyncLink[TokenIds], SyncLink[TokenIds]]:
    ours, theirs = socket.socketpair()
    return AsyncLink(ours, TokenIds), SyncLink(theirs, TokenIds)


async def test_messages_cross_a_link_both_ways_whole_and_in_order() -> None:
    front, engine = pair()
    await front.open()
    sizes = [0, 1, 7, 40_000, 3]
    sent = [TokenIds(ids=range(size)) for size in sizes]

    async def send() -> None:
        for message in sent:
            await front.send(message)

    sending = asyncio.create_task(send())
    received: list[TokenIds] = []
    while len(received) < len(sent):
        received += await asyncio.to_thread(engine.receive, 5)
    await sending
    assert received == sent
    assert engine.receive(0) == []
    engine.send(*sent)
    assert [await front.receive() for _ in sent] == sent
    await front.close()
    engine.close()


async def test_a_loop_that_goes_round_answers_pulses_and_one_that_does_not_is_stuck() -> None:
    front, engine = pair()
    await front.open()
    reading = asyncio.create_task(front.receive())
    stuck = asyncio.create_task(front.stuck(1.2))
    # Also one with nothing to do, which then looks up in vain.
    for _ in range(5):
        assert await asyncio.to_thread(engine.receive, None) == []
    assert not stuck.done()
    assert front.silent_seconds <= 0.3
    await stuck
    assert front.silent_seconds == pytest.approx(1.2)
    # What was said meanwhile is not lost in the pulses.
    await front.send(TokenIds(ids=[1]))
    await front.send(TokenIds())
    assert engine.receive(1) == [TokenIds(ids=[1]), TokenIds()]
    engine.send(TokenIds(ids=[2]))
    assert (await reading).ids == [2]
    await front.close()
    engine.close()


async def test_each_end_learns_that_the_other_is_gone() -> None:
    front, engine = pair()
    await front.open()
    engine.send(TokenIds(ids=[1]))
    engine.close()
    assert [message.ids[0] async for message in front] == [1]
    with pytest.raises(LinkClosed):
        await front.receive()
    await front.close()

    front, engine = pair()
    await front.open()
    await front.send(TokenIds(ids=[2]))
    await front.close()
    assert engine.receive(1)[0].ids == [2]
    with pytest.raises(LinkClosed):
        engine.receive(1)
    engine.close()


@pytest.mark.parametrize("turns", range(5))
async def test_whoever_receives_when_the_link_is_closed_is_told_so(turns: int) -> None:
    front, engine = pair()
    await front.open()

    async def receive_all() -> list[TokenIds]:
        return [message async for message in front]

    receiving = asyncio.create_task(receive_all())
    await asyncio.sleep(0)
    engine.send(TokenIds(ids=[1]))
    # One of these turns of the loop lies between the arrival of a message and its receipt.
    for _ in range(turns):
        await asyncio.sleep(0)
    await front.close()
    assert await receiving in ([], [TokenIds(ids=[1])])
    engine.close()


async def test_several_links_are_received_together_and_only_the_first_ones_end_counts() -> None:
    fronts, engines = zip(*(pair() for _ in range(3)), strict=True)
    for front in fronts:
        await front.open()
    links = SyncLinks(engines)
    assert links.receive(0) == []
    for index, front in enumerate(fronts):
        await front.send(TokenIds(ids=[index]))
        await front.send(TokenIds(ids=[index, index]))
    received: list[TokenIds] = []
    while len(received) < 6:
        received += await asyncio.to_thread(links.receive, 5)
    for index in range(3):
        assert [len(message.ids) for message in received if message.ids[0] == index] == [1, 2]
    await fronts[1].close()
    await asyncio.to_thread(links.receive, 1)
    links.send(1, TokenIds(ids=[7]))  # To nobody.
    links.send(2, TokenIds(ids=[8]))
    assert (await fronts[2].receive()).ids == [8]
    await fronts[2].close()
    links.send(2, TokenIds(ids=[9]))
    links.send(2, TokenIds(ids=[9]))
    await fronts[0].send(TokenIds(ids=[5]))
    assert [message.ids[0] for message in await asyncio.to_thread(links.receive, 5)] == [5]
    await fronts[0].close()
    with pytest.raises(LinkClosed):
        links.receive(5)
    engines[0].close()


def test_slots_of_a_pool_begin_where_it_is_told() -> None:
    pool = SlotPool(2, first=4)
    assert [pool.try_acquire(), pool.try_acquire(), pool.try_acquire()] == [4, 5, None]
    with pytest.raises(ValueError, match="not taken"):
        pool.release(0)
    pool.release(5)
    assert pool.statistics().slots == 2
    assert pool.try_acquire() == 5


def test_a_length_beyond_the_limit_ends_the_link_before_anything_is_allocated() -> None:
    ours, theirs = socket.socketpair()
    link = SyncLink(theirs, TokenIds)
    ours.sendall((MAX_MESSAGE + 1).to_bytes(4, "little"))
    with pytest.raises(LinkClosed, match="announced"):
        link.receive(1)
    ours.close()
    link.close()


ECHO = """
import argparse
from hma_serve.ipc import add_engine_arguments, attach_engine, LinkClosed
from hma_serve.v1.common_pb2 import TokenIds

parser = argparse.ArgumentParser()
add_engine_arguments(parser)
end = attach_engine(parser.parse_args(), receives=TokenIds)
try:
    while True:
        for message in end.link.receive(None):
            end.arena.slot(message.ids[0])[:3] = b"abc"
            end.link.send(message)
except LinkClosed:
    pass
"""


async def test_an_engine_answers_shares_memory_and_leaves_when_its_link_closes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path_factory.mktemp("engine")
    (directory / "echo_engine.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *sys.path]))
    with Arena.create(slots=2, slot_bytes=4096) as arena:
        engine = await spawn_engine("echo_engine", [], receives=TokenIds, arena=arena)
        await engine.link.send(TokenIds(ids=[1]))
        assert (await engine.link.receive()).ids == [1]
        assert bytes(arena.slot(1, 3)) == b"abc"
        assert await engine.stop() == 0
