"""A KvTransfer server for tests: receives like decode, checks every block, and misbehaves on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np

from hma_serve.core.errors import FailedPrecondition, HmaError
from hma_serve.kvblock import StreamPlan, StreamReader, decode_frame, validate_manifest
from hma_serve.rpc import MAX_MESSAGE_BYTES, error_detail
from hma_serve.v1 import kv_transfer_pb2 as pb


@dataclass
class Received:
    """What came by one stream."""

    ticket: bytes
    epoch: int
    plan: StreamPlan
    reader: StreamReader
    resumed: int = 0
    blocks: int = 0
    sizes: list[int] = field(default_factory=list)
    packed: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    committed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def decoded(self, layer: int, role: int) -> np.ndarray:
        """float32 [heads, tokens, head_dim], by the format's own numpy decoder."""
        role_plan = self.plan.roles[layer, role]
        packed = self.packed[layer, role]
        return role_plan.codec.decode(packed.tobytes(), role_plan.kv_heads, self.plan.token_count, role_plan.head_dim)


@dataclass
class Behaviour:
    """How to receive.

    Attributes:
        window: Payload bytes of credit beyond what is acknowledged.
        refusal: Refuse the stream when it opens.
        refuse_at: ... or instead of acknowledging this block.
        stall_at: Never acknowledge, from this block on.
        hang_up_at: End the call after this block, and each that would resume it.
        silent: Never answer at all.
        deaf: Accept, and read nothing.
        withholds: Acknowledge nothing and grant no more, and read all that comes.
        forgets: Know nothing of a stream that is resumed.
        accepted: Replaces the acceptance.
        ack: Replaces the first acknowledgement.
        committed: Replaces the commit.
    """

    window: int = 8 << 20
    refusal: HmaError | None = None
    refuse_at: int | None = None
    stall_at: int | None = None
    hang_up_at: int | None = None
    silent: bool = False
    deaf: bool = False
    withholds: bool = False
    forgets: bool = False
    accepted: pb.PushAccepted | None = None
    ack: pb.PushAck | None = None
    committed: pb.PushCommitted | None = None
    resume: asyncio.Event = field(default_factory=asyncio.Event)


class PushReceiver(grpc.GenericRpcHandler):
    """`async with PushReceiver() as receiver:` serves on `receiver.address`.

    Streams are received as `behaviour` says, or `by_ticket` for single ones.
    """

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.by_ticket: dict[bytes, Behaviour] = {}
        self.streams: list[Received] = []
        self.address = ""
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])

    async def __aenter__(self) -> PushReceiver:
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(0)

    async def kill(self) -> None:
        """As if the process had died."""
        await self._server.stop(0)

    async def stream(self, ticket: bytes, *, blocks: int = 0) -> Received:
        """Waits until that many blocks came with that ticket."""

        def found() -> Received | None:
            return next((one for one in self.streams if one.ticket == ticket and one.blocks >= blocks), None)

        async with self._changed:
            await self._changed.wait_for(found)
        stream = found()
        assert stream is not None
        return stream

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, pb.PushResponse] | None:
        if handler_call_details.method != "/hma_serve.v1.KvTransfer/Push":
            return None
        return grpc.stream_stream_rpc_method_handler(
            self._push, request_deserializer=bytes, response_serializer=pb.PushResponse.SerializeToString
        )

    async def _push(
        self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, pb.PushResponse]
    ) -> AsyncIterator[pb.PushResponse]:
        opening = decode_frame(await anext(frames))[0].open
        how = self.by_ticket.get(opening.ticket, self.behaviour)
        stream = next((one for one in self.streams if one.ticket == opening.ticket), None) if opening.resume else None
        if stream is None or how.forgets:
            plan = validate_manifest(opening.manifest)
            reader = StreamReader(plan, opening.ticket, opening.epoch)
            stream = Received(opening.ticket, opening.epoch, plan, reader)
            self.streams.append(stream)
        stream.resumed += opening.resume
        await self._notify()
        try:
            async for response in self._receive(stream, how, frames):
                yield response
        finally:
            stream.ended.set()

    async def _receive(
        self, stream: Received, how: Behaviour, frames: AsyncIterator[bytes]
    ) -> AsyncIterator[pb.PushResponse]:
        if how.hang_up_at is not None and stream.blocks >= how.hang_up_at:
            # What has ended in good order is not taken up again; a sender whose write failed first may ask.
            return
        if how.silent:
            await asyncio.Event().wait()
        if how.refusal is not None and how.refuse_at is None:
            yield pb.PushResponse(refused=pb.PushRefused(error=error_detail(how.refusal)))
            return
        accepted = how.accepted or pb.PushAccepted(
            transport=pb.TRANSPORT_GRPC,
            max_message_bytes=MAX_MESSAGE_BYTES,
            credit_bytes=stream.reader.payload_bytes + how.window,
            blocks=stream.reader.received,
        )
        yield pb.PushResponse(accepted=accepted)
        if how.deaf:
            await asyncio.Event().wait()
        reader, granted = stream.reader, accepted.credit_bytes
        async for frame in frames:
            header, payload = decode_frame(frame)
            if header.HasField("end"):
                reader.finish(header.end)
                stream.committed = True
                yield pb.PushResponse(
                    committed=how.committed
                    or pb.PushCommitted(blocks=reader.received, payload_bytes=reader.payload_bytes)
                )
                return
            if reader.payload_bytes + len(payload) > granted:
                beyond = FailedPrecondition(f"more was sent than the credit of {granted} bytes", field="payload")
                yield pb.PushResponse(refused=pb.PushRefused(error=error_detail(beyond)))
                return
            self._store(stream, reader, header, payload)
            await self._notify()
            if how.hang_up_at == stream.blocks:
                return
            if how.withholds:
                continue
            if how.refuse_at == stream.blocks and how.refusal is not None:
                yield pb.PushResponse(refused=pb.PushRefused(error=error_detail(how.refusal)))
                return
            if how.stall_at is not None and stream.blocks >= how.stall_at:
                await how.resume.wait()
            credit = reader.payload_bytes + how.window
            ack = how.ack or pb.PushAck(blocks=reader.received, credit_bytes=credit)
            granted = max(granted, ack.credit_bytes)
            yield pb.PushResponse(ack=ack)

    @staticmethod
    def _store(stream: Received, reader: StreamReader, header: pb.PushHeader, payload: memoryview) -> None:
        block = reader.validate(header.block, payload)
        plan = block.role_plan
        shape = (plan.kv_heads, stream.plan.group_count, plan.group_bytes)
        packed = stream.packed.setdefault((block.layer, int(block.role)), np.zeros(shape, np.uint8))
        heads = slice(block.head_start, block.head_start + block.head_count)
        packed[heads, block.group_start : block.group_start + block.group_count] = block.groups()
        stream.blocks += 1
        stream.sizes.append(len(payload))
