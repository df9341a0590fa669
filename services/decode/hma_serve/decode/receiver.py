"""KvTransfer.Push: from a producer's frames to pages, refusing whatever is not exactly what was announced.

Order for every block: parse without copying, check every rule and the checksum, copy once into a shared slot, tell the
engine, acknowledge when the engine has it in its pages. A block that breaks a rule ends the stream with one refusal
before any byte of it is copied; a stream that ends without a commit leaves its ticket empty, so none of it is read.

Bounded everywhere: a producer may send what its credit allows and no more; credit grows with what is in pages, never
falls, and all streams together share the arena; a frame in hand waits for a slot, which slows its stream and nobody
else's for longer than a step; and a silent peer is dropped after `stall_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np

from hma_serve.core.errors import DeadlineExceeded, FailedPrecondition, HmaError, Unavailable
from hma_serve.decode.admission import typed
from hma_serve.decode.engine_client import EngineClient, PushMailbox
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
from hma_serve.telemetry.metrics import DecodeMetrics
from hma_serve.v1 import kv_block_pb2, kv_transfer_pb2

SERVICE = "hma_serve.v1.KvTransfer"

_UNFINISHED_WRITE_SECONDS = 1.0

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[bytes, kv_transfer_pb2.PushResponse]


@dataclass(frozen=True, slots=True)
class ReceiverParts:
    """What every stream shares.

    Attributes:
        engine: Owner of tickets and pages.
        arena: Where blocks wait for the engine.
        slots: Of the arena.
        acceptance: What a manifest must match.
        metrics: What is counted.
        stall_timeout: Seconds that a producer may be silent.
    """

    engine: EngineClient
    arena: Arena
    slots: SlotPool
    acceptance: Acceptance
    metrics: DecodeMetrics
    stall_timeout: float


class Receiver:
    """Serves `hma_serve.v1.KvTransfer`.

    Args:
        parts: Shared by all streams.
    """

    def __init__(self, parts: ReceiverParts) -> None:
        self._parts = parts
        self._active = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service; frames stay bytes, because their payload must not be copied."""
        push: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self.push, request_deserializer=None, response_serializer=kv_transfer_pb2.PushResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Push": push}),))

    async def push(self, frames: AsyncIterator[bytes], context: _Context) -> None:
        """One KV stream; see the schema."""
        self._active += 1
        try:
            await _Push(self._parts, context, self._window).run()
        except KvFormatError as exc:
            await self._refuse(context, typed(exc), exc.rule)
        except HmaError as exc:
            await self._refuse(context, exc, exc.code)
        finally:
            self._active -= 1

    def _window(self) -> int:
        """Bytes that one stream may have under way: its share of the arena, but always one message."""
        return max(MAX_MESSAGE_BYTES, self._parts.arena.slots * self._parts.arena.slot_bytes // max(1, self._active))

    async def _refuse(self, context: _Context, error: HmaError, reason: str) -> None:
        self._parts.metrics.pushes_refused.labels(reason).inc()
        _log.warning("refused a KV stream: %s", error.message)
        refused = kv_transfer_pb2.PushRefused(error=error_detail(error))
        # The producer may be gone.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await context.write(kv_transfer_pb2.PushResponse(refused=refused))


class _Push:
    """One stream."""

    def __init__(self, parts: ReceiverParts, context: _Context, window: Any) -> None:
        self._parts = parts
        self._context = context
        self._window = window
        self._credit = 0
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        header, _ = decode_frame(await self._read())
        if not header.HasField("open"):
            raise FailedPrecondition("a KV stream begins with its open frame", field="header.frame")
        opened = header.open
        plan = self._checked(opened)
        attach = _attach(opened, plan)
        with self._parts.engine.push(attach) as mailbox:
            await self._unless_failed(mailbox, self._transfer(mailbox, attach.push, opened, plan))

    def _checked(self, opened: kv_transfer_pb2.PushOpen) -> StreamPlan:
        if kv_transfer_pb2.TRANSPORT_GRPC not in opened.transports:
            raise FailedPrecondition("none of the offered transports is spoken here", field="open.transports")
        plan = validate_manifest(opened.manifest)
        check_plan(plan, self._parts.acceptance)
        return plan

    async def _unless_failed(self, mailbox: PushMailbox, transfer: Any) -> None:
        """Runs the transfer, or ends it as soon as the engine says why it must."""
        task = asyncio.ensure_future(transfer)
        try:
            await asyncio.wait((task, mailbox.failure), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        if mailbox.failure.done():
            raise mailbox.failure.result()
        task.result()

    async def _transfer(
        self, mailbox: PushMailbox, push: int, opened: kv_transfer_pb2.PushOpen, plan: StreamPlan
    ) -> None:
        await self._within_stall(mailbox.attached.wait(), "the engine")
        self._credit = self._window()
        accepted = kv_transfer_pb2.PushAccepted(
            transport=kv_transfer_pb2.TRANSPORT_GRPC, max_message_bytes=MAX_MESSAGE_BYTES, credit_bytes=self._credit
        )
        await self._write(kv_transfer_pb2.PushResponse(accepted=accepted))
        reader = StreamReader(plan, opened.ticket, opened.epoch)
        acknowledging = asyncio.create_task(self._acknowledge(mailbox))
        try:
            await self._receive(push, reader)
            self._parts.engine.end_push(push)
            await self._within_stall(mailbox.committed.wait(), "the engine")
        finally:
            acknowledging.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await acknowledging
        committed = kv_transfer_pb2.PushCommitted(blocks=reader.received, payload_bytes=reader.payload_bytes)
        await self._write(kv_transfer_pb2.PushResponse(committed=committed))

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
            await self._hand_over(push, reader.validate(header.block, payload))

    async def _hand_over(self, push: int, block: Block) -> None:
        units = block.groups()
        slot = await self._parts.slots.acquire()
        target = np.frombuffer(self._parts.arena.slot(slot, units.size), dtype=np.uint8)
        target.reshape(units.shape)[...] = units
        self._parts.metrics.kv_received_bytes.inc(units.size)
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
        """One ack for all that has landed since the last."""
        while True:
            await mailbox.progress.wait()
            mailbox.progress.clear()
            self._credit = max(self._credit, mailbox.landed_bytes + self._window())
            ack = kv_transfer_pb2.PushAck(blocks=mailbox.landed_blocks, credit_bytes=self._credit)
            await self._write(kv_transfer_pb2.PushResponse(ack=ack))

    async def _read(self) -> bytes:
        frame = await self._within_stall(self._context.read(), "the producer")
        if not isinstance(frame, bytes):
            raise Unavailable("the producer ended the stream before its KV was complete")
        return frame

    async def _write(self, response: kv_transfer_pb2.PushResponse) -> None:
        async with self._writing:
            writing = asyncio.ensure_future(self._context.write(response))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                # A cancelled write stays under way inside gRPC, which takes one at a time: the next would fail.
                await asyncio.wait((writing,), timeout=_UNFINISHED_WRITE_SECONDS)
                raise

    async def _within_stall(self, awaitable: Any, who: str) -> Any:
        try:
            async with asyncio.timeout(self._parts.stall_timeout):
                return await awaitable
        except TimeoutError:
            raise DeadlineExceeded(
                f"waited more than {self._parts.stall_timeout:g} s for {who} of a KV stream"
            ) from None


def _attach(opened: kv_transfer_pb2.PushOpen, plan: StreamPlan) -> decode_engine_pb2.DecodeAttach:
    return decode_engine_pb2.DecodeAttach(
        nonce=opened.ticket,
        epoch=opened.epoch,
        k_codec=_codec_name(plan, kv_block_pb2.KV_ROLE_K),
        v_codec=_codec_name(plan, kv_block_pb2.KV_ROLE_V),
        token_start=plan.token_start,
        token_count=plan.token_count,
    )


def _codec_name(plan: StreamPlan, role: int) -> str:
    """The one codec of a role: a ticket was granted for one per role, the same in every layer."""
    names = {role_plan.codec.name for (_, its_role), role_plan in plan.roles.items() if its_role == role}
    if len(names) != 1:
        raise FailedPrecondition("the layers' codecs differ within a role", field="manifest.layer_groups")
    return names.pop()
