"""What decode keeps of KV streams: taken over by whom, for how long, and never more than was granted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hma_serve.core.errors import FailedPrecondition, Unavailable
from hma_serve.decode import receiver
from hma_serve.decode.landings import Landings
from hma_serve.ipc import SlotPool
from hma_serve.kvblock import MAX_MESSAGE_BYTES, build_manifest, codec, encode_frame, validate_manifest
from hma_serve.v1 import kv_transfer_pb2 as pb
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KvRope


def opened(tokens: int = 64, *, ticket: int = 1, epoch: int = 1) -> pb.PushOpen:
    manifest = build_manifest(
        model_fingerprint="ab" * 32,
        layers=1,
        kv_heads=1,
        head_dim=32,
        k_codec=codec("f32"),
        v_codec=codec("f32"),
        token_start=0,
        token_count=tokens,
        rope=KvRope(pairing=KV_ROPE_PAIRING_HALF_SPLIT, theta=1e4),
        qk_norm=True,
    )
    return pb.PushOpen(ticket=bytes([ticket]) * 16, epoch=epoch, manifest=manifest)


def begun(landings: Landings, opening: pb.PushOpen) -> Any:
    return landings.begin(opening, validate_manifest(opening.manifest))


async def test_a_stream_is_taken_over_by_its_own_ticket_and_attempt_alone() -> None:
    landings = Landings(keep=600)
    landing = begun(landings, opened())
    landings.hold(landing, lambda error: None)
    landings.leave(landing, keep=True)
    assert await landings.take_over(opened()) is landing
    assert await landings.take_over(opened(ticket=2)) is None
    assert await landings.take_over(opened(epoch=2)) is None
    with pytest.raises(FailedPrecondition, match="the manifest that it began with") as refused:
        await landings.take_over(opened(96))
    assert refused.value.field == "manifest"


async def test_the_call_that_holds_a_stream_is_ended_by_the_one_that_goes_on() -> None:
    landings, ended = Landings(keep=600), asyncio.get_running_loop().create_future()
    landing = begun(landings, opened())
    landings.hold(landing, ended.set_result)
    taking = asyncio.create_task(landings.take_over(opened()))
    assert isinstance(await ended, Unavailable)
    assert not taking.done()
    landings.leave(landing, keep=True)
    assert await taking is landing


async def test_what_nobody_goes_on_with_is_forgotten_after_a_lease() -> None:
    landings = Landings(keep=0)
    kept, held = begun(landings, opened()), begun(landings, opened(ticket=2))
    for landing in (kept, held):
        landings.hold(landing, lambda error: None)
        landings.leave(landing, keep=True)
    landings.hold(held, lambda error: None)
    await asyncio.sleep(0.01)
    assert await landings.take_over(opened()) is None
    assert len(landings) == 1
    landings.leave(held, keep=False)
    assert len(landings) == 0


class _SlotTaken(Exception):
    """The block was within its credit."""


async def _taken() -> None:
    raise _SlotTaken


@pytest.mark.parametrize(("size", "outcome"), [(10, _SlotTaken), (11, FailedPrecondition)])
async def test_a_block_beyond_the_credit_is_refused_before_a_slot_is_taken(size: int, outcome: type[Exception]) -> None:
    frame = encode_frame(pb.PushHeader(block=pb.PushHeader().block), memoryview(bytes(size)))

    async def read() -> bytes:
        return frame

    parts = SimpleNamespace(slots=SimpleNamespace(acquire=_taken))
    push = receiver._Push(
        cast(Any, parts), Landings(600), cast(Any, SimpleNamespace(read=read)), cast(Any, None), lambda: 0
    )
    push._credit = 110
    with pytest.raises(outcome):
        await push._receive(1, cast(Any, SimpleNamespace(payload_bytes=100)))


def test_streams_share_the_arena_and_each_may_send_one_message() -> None:
    arena = SimpleNamespace(slots=12, slot_bytes=MAX_MESSAGE_BYTES)
    parts = SimpleNamespace(arena=arena, slots=SlotPool(12), lease=1.0)
    served = receiver.Receiver(cast(Any, parts))
    windows = []
    for active in (0, 1, 3, 100):
        served._active = active
        windows.append(served._window() / MAX_MESSAGE_BYTES)
    assert windows == [12, 12, 4, 1]
