"""One `KvTransfer.Push` call to decode: the handshake, credit, the end, and every way it can go wrong.

The sender waits for credit before it sends and sends nothing after a refusal. A receiver that refuses, stalls, dies or
breaks the protocol ends this stream's own request with a typed error; a wait that nobody ends, `stall_timeout` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from hma_serve.core.errors import Cancelled, HmaError, Internal, Unavailable
from hma_serve.prefill.guard import Guard
from hma_serve.rpc import from_error_detail, from_rpc_error, is_transport_failure
from hma_serve.v1 import kv_transfer_pb2 as pb

METHOD = "/hma_serve.v1.KvTransfer/Push"

_CLOSING_SECONDS = 1.0

# gRPC's own details of an INTERNAL that replaces the peer's status when a write fails as the call ends (grpc#36066).
_FAILED_WRITE = "Internal error from Core"

Result = TypeVar("Result")


def _identity(frame: bytes) -> bytes:
    """Frames are serialised already, with one copy of the payload."""
    return frame


class PushStream:
    """`async with PushStream(...)`: leaving cancels the call unless it ended by itself; the channel stays open.

    Args:
        channel: To the decode that granted the ticket.
        address: Its address, for messages.
        guard: Ends when the request does; told when this stream fails.
        stall_timeout: Seconds that the receiver may let us wait for one thing.
    """

    def __init__(self, channel: grpc.aio.Channel, address: str, guard: Guard, *, stall_timeout: float) -> None:
        self._channel = channel
        self._address = address
        self._guard = guard
        self._stall_timeout = stall_timeout
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._accepted: asyncio.Future[pb.PushAccepted] = asyncio.get_running_loop().create_future()
        self._committed: asyncio.Future[pb.PushCommitted] = asyncio.get_running_loop().create_future()
        self._credit_changed = asyncio.Event()
        self._credit_bytes = 0
        self._sent_blocks = 0
        self._sent_bytes = 0
        self._acked_blocks = 0

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed to the transport."""
        return self._sent_bytes

    async def __aenter__(self) -> Self:
        # The call's own deadline travels with it, so decode knows when we shall have given up.
        method = self._channel.stream_stream(
            METHOD, request_serializer=_identity, response_deserializer=pb.PushResponse.FromString
        )
        self._call = method(timeout=self._guard.remaining())
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An abandoned call is never cancelled by itself (grpc#43462), and its reader must be over before its channel
        # may close (grpc#42125).
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def open(self, frame: bytes) -> pb.PushAccepted:
        """Sends the `PushOpen` frame and waits for its acceptance."""
        await self._write(frame)
        return await self._wait(self._accepted, f"decode at {self._address} to accept the transfer")

    async def await_credit(self, payload_bytes: int) -> None:
        """Waits until the receiver lets us send so many more payload bytes."""
        self._guard.check()
        while self._sent_bytes + payload_bytes > self._credit_bytes:
            self._credit_changed.clear()
            await self._wait(self._credit_changed.wait(), f"decode at {self._address} to grant credit")

    async def send_block(self, frame: bytes, payload_bytes: int) -> None:
        """Hands over one block's frame, for which `await_credit` was awaited; returns when gRPC has taken it."""
        self._sent_blocks += 1
        self._sent_bytes += payload_bytes
        await self._write(frame)

    async def finish(self, frame: bytes) -> pb.PushCommitted:
        """Sends the `PushEnd` frame, waits for the commit and lets the receiver end the stream."""
        await self._write(frame)
        await self._hand_over(self._call.done_writing())
        committed = await self._wait(self._committed, f"decode at {self._address} to commit the KV")
        if (committed.blocks, committed.payload_bytes) != (self._sent_blocks, self._sent_bytes):
            raise self._broken(
                f"it committed {committed.blocks} blocks with {committed.payload_bytes} bytes of "
                f"{self._sent_blocks} with {self._sent_bytes}"
            )
        if self._reader is not None:
            await asyncio.wait((self._reader,), timeout=_CLOSING_SECONDS)
        return committed

    async def _wait(self, awaitable: Awaitable[Result], what: str) -> Result:
        return await self._guard.wait(awaitable, what, limit=self._stall_timeout)

    async def _write(self, frame: bytes) -> None:
        await self._hand_over(self._call.write(frame))

    async def _hand_over(self, written: Awaitable[None]) -> None:
        try:
            await self._wait(written, f"decode at {self._address} to take a frame")
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:
            # The call is over; the reader is about to learn why.
            if self._reader is not None:
                await asyncio.wait((self._reader,), timeout=_CLOSING_SECONDS)
            self._guard.check()
            raise self._lost("the stream ended while we were sending") from exc

    async def _read(self) -> None:
        """Takes the receiver's messages until the stream ends; reports the first thing that is wrong."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._take(response)
            await self._ended()
        except HmaError as exc:
            self._guard.fail(exc)
        except grpc.RpcError as exc:
            self._guard.fail(self._typed(exc))

    async def _ended(self) -> None:
        if self._committed.done():
            return
        code = await self._call.code()
        details = await self._call.details()
        raise self._lost(f"the stream ended before the KV was committed ({details or code.name})")

    def _take(self, response: pb.PushResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted" if not self._accepted.done():
                self._grant(response.accepted.credit_bytes)
                self._accepted.set_result(response.accepted)
            case "ack" if self._accepted.done():
                self._take_ack(response.ack)
            case "committed" if self._accepted.done() and not self._committed.done():
                self._committed.set_result(response.committed)
            case "refused":
                raise self._named(from_error_detail(response.refused.error))
            case event:
                raise self._broken(f"its message {event!r} has no place there")

    def _take_ack(self, ack: pb.PushAck) -> None:
        if not self._acked_blocks <= ack.blocks <= self._sent_blocks:
            raise self._broken(f"it acknowledged {ack.blocks} blocks of {self._sent_blocks}")
        self._acked_blocks = ack.blocks
        self._grant(ack.credit_bytes)

    def _grant(self, credit_bytes: int) -> None:
        if credit_bytes < self._credit_bytes:
            raise self._broken(f"its credit fell from {self._credit_bytes} to {credit_bytes}")
        self._credit_bytes = credit_bytes
        self._credit_changed.set()

    def _typed(self, exc: grpc.RpcError) -> HmaError:
        """What a failed call means for the request."""
        error = from_rpc_error(exc)
        # A peer that goes away cancels its calls; nobody on our side did.
        if isinstance(error, Cancelled) or error.message == _FAILED_WRITE:
            return self._lost("the stream ended before the KV was committed")
        if is_transport_failure(exc):
            return self._lost(error.message)
        return self._named(error)

    def _named(self, error: HmaError) -> HmaError:
        """The peer's error, saying whose it is."""
        message = f"decode at {self._address}: {error.message}"
        return type(error)(message, field=error.field, retry_after=error.retry_after)

    def _lost(self, what: str) -> HmaError:
        # The field tells the router which of the two workers it should look after.
        return Unavailable(f"decode at {self._address}: {what}", field="decode_address")

    def _broken(self, what: str) -> HmaError:
        return Internal(f"decode at {self._address} broke the transfer protocol: {what}")
