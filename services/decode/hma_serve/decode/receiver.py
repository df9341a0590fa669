"""KvTransfer.Push: from a producer's frames to pages, refusing whatever is not exactly what was announced.

Order for every block: parse without copying, check every rule and the checksum, copy once into a shared slot, tell the
engine, acknowledge when the engine has it in its pages. A block that breaks a rule ends the stream with one refusal
before any byte of it is copied, and nothing of a stream without a commit is ever read. A stream whose connection is
lost may go on in another call (`landings.py`).

Bounded everywhere: a producer may send what its credit allows and no more; credit grows with what is in pages, never
falls, and all streams together share the slots; a frame in hand waits for a slot, which slows its stream and nobody
else's for longer than a step. A producer may be silent for as long as its ticket lives, since it may serve others in
between; one that is gone is found by keepalive, and the ticket's lease ends with the router's interest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
import numpy as np

from hma_serve.core.errors import FailedPrecondition, HmaError, Unavailable
from hma_serve.decode.admission import typed
from hma_serve.decode.engine_client import EngineClient, PushMailbox
from hma_serve.decode.landings import Landing, Landings
from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.ipc import Arena, SlotPool
from hma_serve.kvblock import (
    MAX_MESSAGE_BYTES,
    Acceptance,
    Block,
    KvFormatError,
    StreamPlan,
    StreamReader,
    check_plan,
    decode_frame,
    validate_manifest,
)
from hma_serve.rpc import error_detail
from hma_serve.telemetry.spans import KV_RECEIVE
from hma_serve.telemetry.tracing import Span, SpanKind, Trace
from hma_serve.v1 import kv_block_pb2, kv_transfer_pb2

SERVICE = "hma_serve.v1.KvTransfer"

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[bytes, kv_transfer_pb2.PushResponse]

_DRAIN_SECONDS = 1.0

# What the engine says of a stream that wants a ticket which is not its own, or no more; by code and field.
_TICKET_RULES = {
    ("not_found", "ticket"): "unknown_ticket",
    ("failed_precondition", "epoch"): "wrong_epoch",
    ("failed_precondition", "ticket"): "ticket_taken",
}


class Tally(Protocol):
    """Counts what came."""

    def received(self, payload_bytes: int) -> None:
        """A block that broke no rule."""
        ...

    def refused(self, reason: str) -> None:
        """A stream, by the broken rule or the error's code."""
        ...


@dataclass(frozen=True, slots=True)
class ReceiverParts:
    """What every stream shares.

    Attributes:
        engine: Owner of tickets and pages.
        arena: Where blocks wait for the engine.
        slots: Those of the arena that are this receiver's.
        acceptance: What a manifest must match.
        tally: What is counted.
        stall_timeout: Seconds to wait for a stream's first frame, for the engine, and for a producer to read.
        lease: Seconds that a stream without a connection may be resumed.
    """

    engine: EngineClient
    arena: Arena
    slots: SlotPool
    acceptance: Acceptance
    tally: Tally
    stall_timeout: float
    lease: float


class Receiver:
    """Serves `hma_serve.v1.KvTransfer`.

    Args:
        parts: Shared by all streams.
    """

    def __init__(self, parts: ReceiverParts) -> None:
        self._parts = parts
        self._landings = Landings(parts.lease)
        self._active = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service; frames stay bytes, because their payload must not be copied."""
        push: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self.push, request_deserializer=None, response_serializer=kv_transfer_pb2.PushResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Push": push}),))

    async def push(self, frames: AsyncIterator[bytes], context: _Context) -> None:
        """One KV stream; see the schema."""
        responses = _Responses(context, self._parts.stall_timeout)
        self._active += 1
        try:
            await _Push(self._parts, self._landings, context, responses, self._window).run()
            return
        except KvFormatError as exc:
            error, reason = typed(exc), exc.rule
        except HmaError as exc:
            error, reason = exc, _TICKET_RULES.get((exc.code, exc.field), exc.code)
        finally:
            self._active -= 1
        await self._refuse(responses, error, reason)
        await _drain(context)

    def _window(self) -> int:
        """Bytes that one stream may have under way: its share of the slots, but always one message."""
        slots = self._parts.slots.statistics().slots
        return max(MAX_MESSAGE_BYTES, slots * self._parts.arena.slot_bytes // max(1, self._active))

    async def _refuse(self, responses: _Responses, error: HmaError, reason: str) -> None:
        self._parts.tally.refused(reason)
        _log.warning("refused a KV stream: %s", error.message)
        # The producer may be gone, or read nothing.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, HmaError):
            await responses.send(
                kv_transfer_pb2.PushResponse(refused=kv_transfer_pb2.PushRefused(error=error_detail(error)))
            )


async def _drain(context: _Context) -> None:
    """Reads on for a moment: a producer whose write meets the end of the call never sees a refusal (grpc#36066)."""
    with contextlib.suppress(TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while isinstance(await context.read(), bytes):
                pass


class _Responses:
    """The way back of one stream: one write at a time, none for ever.

    gRPC takes a single write at once and keeps a cancelled one under way, so every write goes through here.
    """

    def __init__(self, context: _Context, limit: float) -> None:
        self._context = context
        self._limit = limit
        self._last: asyncio.Future[None] | None = None
        self._turn = asyncio.Lock()

    async def send(self, response: kv_transfer_pb2.PushResponse) -> None:
        """Writes one response once the one before has left.

        Raises:
            Unavailable: The producer takes no response within the limit; nothing more can be said to it.
        """
        async with self._turn:
            if self._last is not None:
                await self._written(self._last)
            self._last = asyncio.ensure_future(self._context.write(response))
            # Its failure is ours while we wait, and nobody's news once the stream has ended.
            self._last.add_done_callback(lambda write: write.cancelled() or write.exception())
            await self._written(self._last)

    async def _written(self, write: asyncio.Future[None]) -> None:
        done, _ = await asyncio.wait((write,), timeout=self._limit)
        if not done:
            raise Unavailable(f"the producer of a KV stream read no response for {self._limit:g} s")
        write.result()


class _Push:
    """One stream."""

    def __init__(
        self,
        parts: ReceiverParts,
        landings: Landings,
        context: _Context,
        responses: _Responses,
        window: Callable[[], int],
    ) -> None:
        self._parts = parts
        self._landings = landings
        self._context = context
        self._responses = responses
        self._window = window
        self._credit = 0
        self._accepted = asyncio.Event()

    async def run(self) -> None:
        header, _ = decode_frame(await self._within_stall(self._read(), "the first frame"))
        if not header.HasField("open"):
            raise FailedPrecondition("a KV stream begins with its open frame", field="header.frame")
        with Trace.of_message(header.open.trace).span(
            KV_RECEIVE, kind=SpanKind.SERVER, epoch=header.open.epoch
        ) as span:
            await self._fill(header.open, span)

    async def _fill(self, opened: kv_transfer_pb2.PushOpen, span: Span) -> None:
        plan = self._checked(opened)
        landing = await self._landings.take_over(opened) if opened.resume else None
        if landing is None:
            landing = Landings.begin(opened, plan)
            committed = await self._land(landing, _attach(opened, plan, resume=False))
        elif landing.committed is not None:
            committed = await self._say_again(landing.committed)
        else:
            committed = await self._land(landing, _attach(opened, plan, resume=True))
        span.set(tokens=plan.token_count, blocks=committed.blocks, bytes=committed.payload_bytes)
        await self._responses.send(kv_transfer_pb2.PushResponse(committed=committed))

    async def _land(self, landing: Landing, attach: decode_engine_pb2.DecodeAttach) -> kv_transfer_pb2.PushCommitted:
        """Takes a stream to its commit, from the beginning or from where a lost call left it."""
        reader, lost = landing.reader, False
        assert reader is not None
        try:
            with self._parts.engine.push(attach, reader.received, reader.payload_bytes) as mailbox:
                if attach.resume:
                    self._landings.hold(landing, mailbox.fail)
                transfer = self._transfer(mailbox, attach.push, landing, reader)
                await _first_end(transfer, self._acknowledge(mailbox), mailbox.failure)
                return landing.commit(blocks=mailbox.landed_blocks, payload_bytes=mailbox.landed_bytes)
        except (asyncio.CancelledError, Unavailable):
            lost = True
            raise
        finally:
            self._landings.leave(landing, keep=lost or landing.committed is not None)

    async def _say_again(self, committed: kv_transfer_pb2.PushCommitted) -> kv_transfer_pb2.PushCommitted:
        """To a producer that lost the connection before it heard that all is well."""
        await self._accept(committed.blocks, committed.payload_bytes)
        header, _ = decode_frame(await self._within_stall(self._read(), "the end"))
        if header.end.blocks != committed.blocks:
            raise FailedPrecondition("the stream was committed; only its end may follow", field="header.frame")
        return committed

    def _checked(self, opened: kv_transfer_pb2.PushOpen) -> StreamPlan:
        if kv_transfer_pb2.TRANSPORT_GRPC not in opened.transports:
            raise FailedPrecondition("none of the offered transports is spoken here", field="open.transports")
        plan = validate_manifest(opened.manifest)
        check_plan(plan, self._parts.acceptance)
        return plan

    async def _transfer(self, mailbox: PushMailbox, push: int, landing: Landing, reader: StreamReader) -> None:
        await self._within_stall(mailbox.attached.wait(), "the engine")
        self._landings.hold(landing, mailbox.fail)
        await self._accept(reader.received, reader.payload_bytes)
        await self._receive(push, reader)
        self._parts.engine.end_push(push)
        await self._within_stall(mailbox.committed.wait(), "the engine")

    async def _accept(self, blocks: int, payload_bytes: int) -> None:
        self._credit = payload_bytes + self._window()
        accepted = kv_transfer_pb2.PushAccepted(
            transport=kv_transfer_pb2.TRANSPORT_GRPC,
            max_message_bytes=MAX_MESSAGE_BYTES,
            credit_bytes=self._credit,
            blocks=blocks,
        )
        await self._responses.send(kv_transfer_pb2.PushResponse(accepted=accepted))
        self._accepted.set()

    async def _receive(self, push: int, reader: StreamReader) -> None:
        """Takes blocks until the end frame; all of them are on their way to the engine then."""
        while True:
            header, payload = decode_frame(await self._read())
            kind = header.WhichOneof("frame")
            if kind == "end":
                reader.finish(header.end)
                return
            if kind != "block":
                raise FailedPrecondition("only blocks and the end may follow the open frame", field="header.frame")
            if reader.payload_bytes + len(payload) > self._credit:
                raise FailedPrecondition(f"more was sent than the credit of {self._credit} bytes", field="payload")
            # The slot first: a block that counts as received is on its way to the engine, whatever ends the call.
            slot = await self._parts.slots.acquire()
            try:
                block = reader.validate(header.block, payload)
            except KvFormatError:
                self._parts.slots.release(slot)
                raise
            self._hand_over(push, block, slot)

    def _hand_over(self, push: int, block: Block, slot: int) -> None:
        units = block.groups()
        target = np.frombuffer(self._parts.arena.slot(slot, units.size), dtype=np.uint8)
        target.reshape(units.shape)[...] = units
        self._parts.tally.received(units.size)
        stored = decode_engine_pb2.DecodeBlock(
            push=push,
            slot=slot,
            length=units.size,
            layer=block.layer,
            role=block.role,
            head_start=block.head_start,
            head_count=block.head_count,
            group_start=block.group_start,
            group_count=block.group_count,
        )
        self._parts.engine.store(stored)

    async def _acknowledge(self, mailbox: PushMailbox) -> None:
        """One ack for all that has landed since the last; runs until it is cancelled."""
        await self._accepted.wait()
        while True:
            await mailbox.progress.wait()
            mailbox.progress.clear()
            self._credit = max(self._credit, mailbox.landed_bytes + self._window())
            ack = kv_transfer_pb2.PushAck(blocks=mailbox.landed_blocks, credit_bytes=self._credit)
            await self._responses.send(kv_transfer_pb2.PushResponse(ack=ack))

    async def _read(self) -> bytes:
        # No limit of its own: a producer may serve other requests in between. The ticket's lease, which the router
        # renews, ends the wait through the engine, and keepalive finds a producer that is gone.
        frame = await self._context.read()
        if not isinstance(frame, bytes):
            raise Unavailable("the producer ended the stream before its KV was complete")
        return frame

    async def _within_stall(self, awaitable: Any, who: str) -> Any:
        try:
            async with asyncio.timeout(self._parts.stall_timeout):
                return await awaitable
        except TimeoutError:
            raise Unavailable(f"waited more than {self._parts.stall_timeout:g} s for {who} of a KV stream") from None


async def _first_end(
    transfer: Coroutine[Any, Any, None], beside: Coroutine[Any, Any, None], failure: asyncio.Future[HmaError]
) -> None:
    """Runs the transfer to its end, or until what runs beside it, or the engine, says why it must end now."""
    tasks = [asyncio.ensure_future(transfer), asyncio.ensure_future(beside)]
    ends: list[asyncio.Future[Any]] = [*tasks, failure]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _attach(opened: kv_transfer_pb2.PushOpen, plan: StreamPlan, *, resume: bool) -> decode_engine_pb2.DecodeAttach:
    return decode_engine_pb2.DecodeAttach(
        nonce=opened.ticket,
        epoch=opened.epoch,
        k_codec=_codec_name(plan, kv_block_pb2.KV_ROLE_K),
        v_codec=_codec_name(plan, kv_block_pb2.KV_ROLE_V),
        token_start=plan.token_start,
        token_count=plan.token_count,
        rope_pairing=plan.manifest.rope.pairing,
        resume=resume,
    )


def _codec_name(plan: StreamPlan, role: int) -> str:
    """The one codec of a role: a ticket was granted for one per role, the same in every layer."""
    names = {role_plan.codec.name for (_, its_role), role_plan in plan.roles.items() if its_role == role}
    if len(names) != 1:
        raise FailedPrecondition("the layers' codecs differ within a role", field="manifest.layer_groups")
    return names.pop()
