"""The streamer against a real KvTransfer server that gives little credit, refuses, stalls, dies or lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import torch

from hma_serve.core.errors import DeadlineExceeded, FailedPrecondition, HmaError, Internal, NotFound, Unavailable
from hma_serve.internal.v1.prefill_engine_pb2 import PrefillLayerDone
from hma_serve.ipc import Arena
from hma_serve.kvblock import BEST_PAYLOAD_BYTES, build_manifest, codec, codec_for
from hma_serve.prefill import streamer as streamer_module
from hma_serve.prefill.guard import Guard
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.push_stream import Patience
from hma_serve.prefill.streamer import Destination, Streamer, Transfers
from hma_serve.rpc import ChannelCache
from hma_serve.v1 import common_pb2, kv_transfer_pb2
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KvAgreement, KvManifest, KvRope
from support.push_receiver import Behaviour, PushReceiver
from support.tcp_proxy import TcpProxy

HEADS, HEAD_DIM, LAYERS, TOKENS = 2, 32, 3, 128
UNIT = 32 * HEAD_DIM * 4
LAYOUT = KvLayout(LAYERS, HEADS, (UNIT, UNIT))
F32, BF16 = codec("f32"), codec("bf16")
TICKET = bytes(range(16))
STALL = 0.3
PATIENT = 30.0


def manifest(token_start: int, token_count: int, agreement: KvAgreement | None) -> KvManifest:
    agreed = agreement or KvAgreement(k_codec=F32.spec(), v_codec=F32.spec())
    return build_manifest(
        model_fingerprint="ab" * 32,
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        k_codec=codec_for(agreed.k_codec),
        v_codec=codec_for(agreed.v_codec),
        token_start=token_start,
        token_count=token_count,
        rope=KvRope(pairing=KV_ROPE_PAIRING_HALF_SPLIT, theta=1e4),
        qk_norm=True,
    )


@pytest.fixture
def arena() -> Iterator[Arena]:
    """One filled slot per layer."""
    with Arena.create(LAYERS, LAYOUT.layer_bytes(TOKENS)) as made:
        for layer in range(LAYERS):
            values = np.random.default_rng(layer).standard_normal(LAYOUT.layer_bytes(TOKENS) // 4)
            made.slot(layer)[:] = values.astype("<f4").tobytes()
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[PushReceiver]:
    async with PushReceiver() as made:
        yield made


@pytest.fixture
async def channels() -> AsyncIterator[ChannelCache]:
    made = ChannelCache()
    yield made
    await made.close()


def layer_done(layer: int, *, token_start: int = 0, token_count: int = TOKENS) -> PrefillLayerDone:
    return PrefillLayerDone(
        job=1,
        layer=layer,
        token_start=token_start,
        token_count=token_count,
        head_count=HEADS,
        slot=layer,
        chunk_start=0,
        chunk_tokens=TOKENS,
    )


class Sender:
    """Streamers to one address."""

    def __init__(self, arena: Arena, channels: ChannelCache, address: str) -> None:
        self.arena, self.channels, self.address, self.ranks = arena, channels, address, 1
        self.guard = Guard(PATIENT)

    def streamer(
        self,
        *,
        stall: float = PATIENT,
        resume: float = 0.0,
        token_start: int = 0,
        ticket: bytes = TICKET,
        agreement: KvAgreement | None = None,
    ) -> Streamer:
        patience = Patience(stall, resume)
        transfers = Transfers(self.channels, self.arena, LAYOUT, (F32, F32), manifest, patience, self.ranks)
        return Streamer(
            transfers,
            Destination(self.address, ticket, 4),
            token_start=token_start,
            token_count=TOKENS - token_start,
            agreement=agreement,
            guard=self.guard,
            trace=common_pb2.TraceContext(),
        )

    async def send_all(self, *, stall: float = PATIENT, resume: float = 0.0) -> int:
        async with self.streamer(stall=stall, resume=resume) as streamer:
            for layer in range(LAYERS):
                await streamer.send_layer(layer_done(layer))
            await streamer.commit()
            return streamer.sent_bytes

    @property
    def channel_users(self) -> int:
        return sum(self.channels._users.values())


@pytest.fixture
async def sender(arena: Arena, channels: ChannelCache, receiver: PushReceiver) -> Sender:
    return Sender(arena, channels, receiver.address)


def check_arrived(receiver: PushReceiver, arena: Arena) -> None:
    stream = receiver.streams[-1]
    assert stream.committed
    assert (stream.ticket, stream.epoch) == (TICKET, 4)
    for layer in range(LAYERS):
        expected = np.frombuffer(arena.slot(layer), "<f4").reshape(2, HEADS, TOKENS, HEAD_DIM)
        for index, role in enumerate(ROLES):
            np.testing.assert_array_equal(stream.decoded(layer, role), expected[index])


async def test_everything_arrives_as_the_engine_left_it(sender: Sender, receiver: PushReceiver, arena: Arena) -> None:
    assert await sender.send_all() == LAYERS * LAYOUT.layer_bytes(TOKENS)
    check_arrived(receiver, arena)
    assert receiver.streams[0].blocks == 2 * LAYERS
    assert sender.channel_users == 0


async def test_each_rank_s_heads_leave_as_blocks_of_their_own(
    sender: Sender, receiver: PushReceiver, arena: Arena
) -> None:
    sender.ranks = HEADS
    await sender.send_all()
    check_arrived(receiver, arena)
    assert receiver.streams[0].blocks == 2 * LAYERS * HEADS
    assert set(receiver.streams[0].sizes) == {LAYOUT.layer_bytes(TOKENS) // (2 * HEADS)}


async def test_what_was_agreed_is_packed_again_on_its_way_out(
    sender: Sender, receiver: PushReceiver, arena: Arena
) -> None:
    before = [bytes(arena.slot(layer)) for layer in range(LAYERS)]
    agreed = KvAgreement(k_codec=F32.spec(), v_codec=BF16.spec())
    async with sender.streamer(agreement=agreed) as streamer:
        for layer in range(LAYERS):
            await streamer.send_layer(layer_done(layer))
        await streamer.commit()
    assert streamer.sent_bytes == LAYERS * LAYOUT.layer_bytes(TOKENS) * 3 // 4
    assert [bytes(arena.slot(layer)) for layer in range(LAYERS)] == before
    (stream,) = receiver.streams
    assert stream.committed
    for layer in range(LAYERS):
        keys, values = np.frombuffer(arena.slot(layer), "<f4").reshape(2, HEADS, TOKENS, HEAD_DIM)
        np.testing.assert_array_equal(stream.decoded(layer, ROLES[0]), keys)
        rounded = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        np.testing.assert_array_equal(stream.decoded(layer, ROLES[1]), rounded)


@pytest.mark.parametrize("window", [UNIT, 3 * UNIT + 1])
async def test_little_credit_makes_small_blocks_and_is_never_exceeded(
    sender: Sender, receiver: PushReceiver, arena: Arena, window: int
) -> None:
    receiver.behaviour = Behaviour(window=window)
    await sender.send_all()
    check_arrived(receiver, arena)
    assert max(receiver.streams[0].sizes) <= window


async def test_a_message_is_of_the_best_size_however_much_the_receiver_takes(
    sender: Sender, receiver: PushReceiver, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BEST_PAYLOAD_BYTES == 1 << 20
    monkeypatch.setattr(streamer_module, "BEST_PAYLOAD_BYTES", HEADS * UNIT)
    await sender.send_all()
    check_arrived(receiver, arena)
    assert set(receiver.streams[0].sizes) == {HEADS * UNIT}


async def test_tokens_that_decode_holds_are_not_sent(sender: Sender, receiver: PushReceiver) -> None:
    async with sender.streamer(token_start=64) as streamer:
        for layer in range(LAYERS):
            await streamer.send_layer(layer_done(layer, token_start=64, token_count=0))
            await streamer.send_layer(layer_done(layer, token_start=64, token_count=64))
        await streamer.commit()
    assert receiver.streams[0].plan.token_start == 64
    assert receiver.streams[0].committed


def accepted(
    *,
    transport: int = kv_transfer_pb2.TRANSPORT_GRPC,
    max_message_bytes: int = 2 << 20,
    credit_bytes: int = 8 << 20,
) -> kv_transfer_pb2.PushAccepted:
    return kv_transfer_pb2.PushAccepted(
        transport=kv_transfer_pb2.Transport.ValueType(transport),
        max_message_bytes=max_message_bytes,
        credit_bytes=credit_bytes,
    )


FAILURES = {
    "refused at the handshake": (
        Behaviour(refusal=NotFound("no such ticket", field="ticket")),
        NotFound,
        r"decode at .*: no such ticket",
    ),
    "refused in the middle": (
        Behaviour(window=2 * UNIT, refusal=FailedPrecondition("stale epoch", field="epoch"), refuse_at=3),
        FailedPrecondition,
        r"decode at .*: stale epoch",
    ),
    "no answer to the handshake": (Behaviour(silent=True), Unavailable, r"to accept the transfer"),
    "stalled": (Behaviour(window=2 * UNIT, stall_at=2), Unavailable, r"to grant credit"),
    "no credit at all": (Behaviour(accepted=accepted(credit_bytes=0)), Unavailable, r"to grant credit"),
    "stalled at the end": (Behaviour(stall_at=2 * LAYERS), Unavailable, r"to commit the KV"),
    "hung up": (Behaviour(hang_up_at=2), Unavailable, r"ended before the KV was committed|while we were sending"),
    "unknown transport": (Behaviour(accepted=accepted(transport=7)), FailedPrecondition, r"not offered"),
    "messages too small": (
        Behaviour(accepted=accepted(max_message_bytes=4096)),
        FailedPrecondition,
        r"messages of 4096 bytes",
    ),
    "acknowledged what was not sent": (
        Behaviour(window=2 * UNIT, ack=kv_transfer_pb2.PushAck(blocks=99, credit_bytes=1 << 30)),
        Internal,
        r"acknowledged 99 blocks",
    ),
    "credit fell": (
        Behaviour(window=2 * UNIT, ack=kv_transfer_pb2.PushAck(blocks=1, credit_bytes=7)),
        Internal,
        r"credit fell",
    ),
    "committed something else": (
        Behaviour(committed=kv_transfer_pb2.PushCommitted(blocks=1, payload_bytes=2)),
        Internal,
        r"committed 1 blocks",
    ),
}


@pytest.mark.parametrize("name", list(FAILURES))
async def test_a_bad_receiver_gives_a_typed_error_and_frees_the_call(
    sender: Sender, receiver: PushReceiver, name: str
) -> None:
    receiver.behaviour, kind, message = FAILURES[name]
    with pytest.raises(kind, match=message) as caught:
        await sender.send_all(stall=STALL if kind is Unavailable else PATIENT)
    assert type(caught.value) is kind
    # Which of the two workers is to be avoided, unless the receiver has said what is wrong.
    refused = receiver.behaviour.refusal
    assert caught.value.field == ("decode_address" if refused is None else refused.field)
    assert sender.channel_users == 0
    async with asyncio.timeout(5):
        await receiver.streams[0].ended.wait()


@pytest.mark.parametrize("refusal", [Unavailable("the decode engine is gone"), Internal("a bug")])
async def test_a_receiver_that_cannot_go_on_is_the_one_to_avoid(
    sender: Sender, receiver: PushReceiver, refusal: HmaError
) -> None:
    receiver.behaviour = Behaviour(refusal=refusal)
    with pytest.raises(type(refusal), match=refusal.message) as caught:
        await sender.send_all()
    assert caught.value.field == "decode_address"


async def test_the_field_of_a_refusal_is_kept(sender: Sender, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(refusal=FailedPrecondition("another model", field="model_fingerprint"))
    with pytest.raises(FailedPrecondition) as caught:
        await sender.send_all()
    assert caught.value.field == "model_fingerprint"


async def test_a_receiver_that_dies_is_noticed(sender: Sender, receiver: PushReceiver) -> None:
    async with sender.streamer() as streamer:
        await streamer.send_layer(layer_done(0))
        await receiver.kill()
        with pytest.raises(Unavailable, match="decode at"):
            await streamer.commit()
    assert sender.channel_users == 0


async def test_nobody_listens(arena: Arena, channels: ChannelCache, receiver: PushReceiver) -> None:
    await receiver.kill()
    with pytest.raises(Unavailable, match="decode at"):
        await Sender(arena, channels, receiver.address).send_all()


async def test_the_deadline_of_the_request_ends_a_wait(sender: Sender, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(silent=True)
    sender.guard = Guard(STALL)
    with pytest.raises(DeadlineExceeded):
        await sender.send_all()


async def test_a_failure_elsewhere_ends_a_wait_at_once(sender: Sender, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(silent=True)
    sending = asyncio.create_task(sender.send_all())
    await receiver.stream(TICKET)
    failure: HmaError = Unavailable("the prefill engine is gone")
    sender.guard.fail(failure)
    with pytest.raises(Unavailable) as caught:
        await sending
    assert caught.value is failure


async def test_a_stalled_transfer_does_not_hold_another_to_the_same_decode(
    sender: Sender, receiver: PushReceiver, arena: Arena, channels: ChannelCache
) -> None:
    slow = Behaviour(window=2 * UNIT, stall_at=1)
    receiver.by_ticket[b"s" * 16] = slow
    async with sender.streamer(ticket=b"s" * 16) as stalled:
        blocked = asyncio.create_task(stalled.send_layer(layer_done(0)))
        await Sender(arena, channels, receiver.address).send_all()
        check_arrived(receiver, arena)
        assert not blocked.done()
        slow.resume.set()
        await blocked
        for layer in range(1, LAYERS):
            await stalled.send_layer(layer_done(layer))
        await stalled.commit()


async def test_cancelling_ends_the_call(sender: Sender, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(window=2 * UNIT, stall_at=1)
    sending = asyncio.create_task(sender.send_all())
    await receiver.stream(TICKET, blocks=1)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert sender.channel_users == 0
    async with asyncio.timeout(5):
        await receiver.streams[0].ended.wait()


async def through_a_cut(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver, how: Behaviour, *, healed: bool = True
) -> int:
    """Sends everything; the connection is cut when the receiver holds three blocks and has acknowledged two."""
    receiver.behaviour = how
    host, _, port = receiver.address.rpartition(":")
    with TcpProxy((host, int(port))) as proxy:
        sender = Sender(arena, channels, f"127.0.0.1:{proxy.port}")
        sending = asyncio.create_task(sender.send_all(resume=PATIENT if healed else STALL))
        await receiver.stream(TICKET, blocks=3)
        proxy.cut()
        await receiver.streams[0].ended.wait()
        how.stall_at = None
        if healed:
            proxy.heal()
        return await sending


async def test_a_connection_that_dies_again_and_again_ends_the_request(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver
) -> None:
    """Time to go on is counted from the last progress, not from the last loss."""
    how = receiver.behaviour = Behaviour(window=4 * UNIT, stall_at=3)
    host, _, port = receiver.address.rpartition(":")
    with TcpProxy((host, int(port))) as proxy:
        sending = asyncio.create_task(Sender(arena, channels, f"127.0.0.1:{proxy.port}").send_all(resume=PATIENT / 10))
        stream, how.deaf, losses = await receiver.stream(TICKET, blocks=3), True, 0
        while not sending.done():
            if stream.resumed >= losses:
                losses += 1
                proxy.cut()
                await asyncio.sleep(0.05)
                proxy.heal()
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="decode at"):
            await sending
    assert losses > 2


async def test_a_lost_stream_goes_on_after_the_last_block_that_arrived(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver
) -> None:
    sent = await through_a_cut(arena, channels, receiver, Behaviour(window=4 * UNIT, stall_at=3))
    check_arrived(receiver, arena)
    (stream,) = receiver.streams
    assert stream.resumed >= 1
    # Nothing travelled twice that had arrived, and nothing counts twice.
    assert sum(stream.sizes) == sent == LAYERS * LAYOUT.layer_bytes(TOKENS)


async def test_a_lost_stream_goes_on_no_faster_than_the_receiver_lets_it_now(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent on credit before the loss is sent again on the new call's, which may be less."""
    monkeypatch.setattr(streamer_module, "BEST_PAYLOAD_BYTES", UNIT)
    how = receiver.behaviour = Behaviour(window=8 * UNIT, withholds=True)
    host, _, port = receiver.address.rpartition(":")
    with TcpProxy((host, int(port))) as proxy:
        sender = Sender(arena, channels, f"127.0.0.1:{proxy.port}")
        async with sender.streamer(resume=PATIENT) as streamer:
            sending = asyncio.create_task(streamer.send_layer(layer_done(0)))
            before = await receiver.stream(TICKET, blocks=8)
            proxy.cut()
            await before.ended.wait()
            receiver.streams.clear()  # it need not keep what it has not acknowledged
            how.window = 2 * UNIT
            proxy.heal()
            resumed = await receiver.stream(TICKET, blocks=2)
            # A third would be refused.
            await asyncio.wait((sending,), timeout=STALL)
            assert not sending.done()
            assert resumed.sizes == [UNIT, UNIT]
            sending.cancel()


async def test_a_receiver_that_has_lost_what_it_acknowledged_ends_the_request(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver
) -> None:
    with pytest.raises(Unavailable, match=r"has 0 of the 2 blocks that it acknowledged"):
        await through_a_cut(arena, channels, receiver, Behaviour(window=4 * UNIT, stall_at=3, forgets=True))


async def test_a_stream_that_cannot_go_on_in_time_ends_the_request(
    arena: Arena, channels: ChannelCache, receiver: PushReceiver
) -> None:
    with pytest.raises(Unavailable, match="decode at"):
        await through_a_cut(arena, channels, receiver, Behaviour(window=4 * UNIT, stall_at=3), healed=False)
    assert sum(channels._users.values()) == 0


async def test_what_is_kept_for_a_lost_stream_is_bounded_by_the_credit(sender: Sender, receiver: PushReceiver) -> None:
    receiver.behaviour = Behaviour(window=5 * UNIT)
    async with sender.streamer() as streamer:
        for layer in range(LAYERS):
            await streamer.send_layer(layer_done(layer))
            assert streamer._stream.kept_bytes <= 5 * UNIT
        await streamer.commit()
