"""One `KvTransfer.Push` call to decode: the handshake, credit, the end, and every way it can go wrong.

The sender waits for credit before it sends and sends nothing after a refusal. A receiver that refuses, stalls or breaks
the protocol ends this stream's own request with a typed error; a wait that nobody ends, `stall_timeout` does. A call
that is lost with its connection is another matter: `StreamLost`, after which the stream may go on with a new call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from hma_serve.core.errors import Cancelled, HmaError, Internal, Unavailable
from hma_serve.prefill.guard import Guard
from hma_serve.rpc import from_error_detail, from_rpc_error, is_transport_failure
from hma_serve.v1 import kv_transfer_pb2 as pb

METHOD = "/hma_serve.v1.KvTransfer/Push"

DECODE_ADDRESS = "decode_address"
"""The field of every error that is decode's own doing: it tells the router which of the two workers to look after."""

_CLOSING_SECONDS = 1.0

# gRPC's own details of an INTERNAL that replaces the peer's status when a write fails as the call ends (grpc#36066).
_FAILED_WRITE = "Internal error from Core"

Result = TypeVar("Result")


class StreamLost(Exception):
    """The connection is gone; what the receiver has acknowledged is safe there."""


def _identity(frame: bytes) -> bytes:
    """Frames are serialised already, with one copy of the payload."""
    return frame


class PushCall:
    """`async with PushCall(...)`: leaving cancels the call unless it ended by itself; the channel stays open.

    Every method raises StreamLost when the connection is lost, and otherwise what ended the request.

    Args:
        channel: To the decode that granted the ticket.
        address: Its address, for messages.
        guard: Ends when the request does; told when this call fails for good.
        stall_timeout: Seconds that the receiver may let us wait for one thing.
        take_ack: Told each acknowledgement; raises if it cannot be.
        wait_for_ready: Wait for a connection instead of failing when there is none.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        guard: Guard,
        *,
        stall_timeout: float,
        take_ack: Callable[[pb.PushAck], None],
        wait_for_ready: bool = False,
    ) -> None:
        self._channel = channel
        self._address = address
        self._guard = guard
        self._stall_timeout = stall_timeout
        self._report_ack = take_ack
        self._wait_for_ready = wait_for_ready
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[pb.PushAccepted] = loop.create_future()
        self._committed: asyncio.Future[pb.PushCommitted] = loop.create_future()
        self._lost: asyncio.Future[StreamLost] = loop.create_future()
        self._credit_changed = asyncio.Event()
        self._credit_bytes = 0

    async def __aenter__(self) -> Self:
        # The call's own deadline travels with it, so decode knows when we shall have given up.
        method = self._channel.stream_stream(
            METHOD, request_serializer=_identity, response_deserializer=pb.PushResponse.FromString
        )
        self._call = method(timeout=self._guard.remaining(), wait_for_ready=self._wait_for_ready)
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

    async def open(self, frame: bytes, *, limit: float | None = None) -> pb.PushAccepted:
        """Sends the `PushOpen` frame and waits for its acceptance, for `limit` seconds if that is less."""

        async def opened() -> pb.PushAccepted:
            await self.write(frame)
            return await self._accepted

        return await self._wait(opened(), f"decode at {self._address} to accept the transfer", limit=limit)

    async def await_credit(self, total_bytes: int) -> None:
        """Waits until the receiver lets the stream send so many payload bytes in all."""
        self._guard.check()
        while total_bytes > self._credit_bytes:
            self._credit_changed.clear()
            await self._wait(self._credit_changed.wait(), f"decode at {self._address} to grant credit")

    async def write(self, frame: bytes) -> None:
        """Hands over one frame; returns when gRPC has taken it."""
        await self._hand_over(self._call.write(frame))

    async def finish(self, frame: bytes) -> pb.PushCommitted:
        """Sends the `PushEnd` frame, waits for the commit and lets the receiver end the call."""
        await self.write(frame)
        await self._hand_over(self._call.done_writing())
        committed = await self._wait(self._committed, f"decode at {self._address} to commit the KV")
        if self._reader is not None:
            await asyncio.wait((self._reader,), timeout=_CLOSING_SECONDS)
        return committed

    async def _wait(self, awaitable: Awaitable[Result], what: str, *, limit: float | None = None) -> Result:
        limit = self._stall_timeout if limit is None else min(limit, self._stall_timeout)
        return await self._guard.wait(self._unless_lost(awaitable), what, limit=limit, field=DECODE_ADDRESS)

    async def _unless_lost(self, awaitable: Awaitable[Result]) -> Result:
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait((task, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._lost.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _hand_over(self, written: Awaitable[None]) -> None:
        try:
            await self._wait(written, f"decode at {self._address} to take a frame")
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:
            # The call is over; the reader is about to learn why.
            if self._reader is not None:
                await asyncio.wait((self._reader,), timeout=_CLOSING_SECONDS)
            self._guard.check()
            raise StreamLost("the stream ended while we were sending") from exc

    async def _read(self) -> None:
        """Takes the receiver's messages until the call ends; reports the first thing that is wrong."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._take(response)
            await self._ended()
        except HmaError as exc:
            self._guard.fail(exc)
        except grpc.RpcError as exc:
            self._failed(exc)

    async def _ended(self) -> None:
        """A receiver that ends the call in good order without a commit will not take it up again."""
        if self._committed.done():
            return
        code = await self._call.code()
        details = await self._call.details()
        raise gone(self._address, f"the stream ended before the KV was committed ({details or code.name})")

    def _take(self, response: pb.PushResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted" if not self._accepted.done():
                self._grant(response.accepted.credit_bytes)
                self._accepted.set_result(response.accepted)
            case "ack" if self._accepted.done():
                self._report_ack(response.ack)
                self._grant(response.ack.credit_bytes)
            case "committed" if self._accepted.done() and not self._committed.done():
                self._committed.set_result(response.committed)
            case "refused":
                raise self._named(from_error_detail(response.refused.error))
            case event:
                raise broken(self._address, f"its message {event!r} has no place there")

    def _grant(self, credit_bytes: int) -> None:
        if credit_bytes < self._credit_bytes:
            raise broken(self._address, f"its credit fell from {self._credit_bytes} to {credit_bytes}")
        self._credit_bytes = credit_bytes
        self._credit_changed.set()

    def _failed(self, exc: grpc.RpcError) -> None:
        """What a failed call means: its own end only, or the request's."""
        error = from_rpc_error(exc)
        # A peer that goes away cancels its calls; nobody on our side did.
        if isinstance(error, Cancelled) or error.message == _FAILED_WRITE or is_transport_failure(exc):
            if not self._lost.done():
                self._lost.set_result(StreamLost(f"the stream was lost before the KV was committed ({error.message})"))
            return
        self._guard.fail(self._named(error))

    def _named(self, error: HmaError) -> HmaError:
        """The peer's error, saying whose it is."""
        message = f"decode at {self._address}: {error.message}"
        own = error.field or (DECODE_ADDRESS if isinstance(error, (Unavailable, Internal)) else "")
        return type(error)(message, field=own, retry_after=error.retry_after)


def broken(address: str, what: str) -> HmaError:
    """The receiver did what the protocol forbids."""
    return Internal(f"decode at {address} broke the transfer protocol: {what}", field=DECODE_ADDRESS)


def gone(address: str, what: str) -> HmaError:
    """The receiver cannot be reached any more."""
    return Unavailable(f"decode at {address}: {what}", field=DECODE_ADDRESS)
