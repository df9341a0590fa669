"""One stream of KV to decode, over as many calls as it takes.

Frames stay here until decode has acknowledged them; credit bounds how many that are. When a connection is lost, a new
call asks decode where it stands and goes on with the first block that is not there: sequence, bytes and checksums are
those of the first time. Decode keeps what has landed as long as the ticket lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc.aio

from hma_serve.core.errors import Unavailable
from hma_serve.kvblock import encode_frame
from hma_serve.prefill.guard import Guard
from hma_serve.prefill.push_call import PushCall, StreamLost, broken, gone
from hma_serve.v1 import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.1

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one stream waits.

    Attributes:
        stall: Seconds that the receiver may let it wait for one thing.
        resume: Seconds after a lost connection until it must go on.
    """

    stall: float
    resume: float


class PushStream:
    """`async with PushStream(...)`: `open`, blocks, `finish`; leaving ends the call, whatever happened.

    Args:
        channel: To the decode that granted the ticket.
        address: Its address, for messages.
        guard: Ends when the request does; told when this stream fails.
        patience: See there.
        opening: The first frame.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, guard: Guard, *, patience: Patience, opening: pb.PushOpen
    ) -> None:
        self._channel = channel
        self._address = address
        self._guard = guard
        self._patience = patience
        self._opening = opening
        self._exit = AsyncExitStack()
        self._call: PushCall
        # Frames and payload sizes of the blocks from `_acked_blocks` on.
        self._kept: deque[tuple[bytes, int]] = deque()
        self._acked_blocks = 0
        self._acked_bytes = 0
        self._sent_bytes = 0
        self._resumed_at = -1
        self._give_up = 0.0

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed to the transport, each block's once."""
        return self._sent_bytes

    @property
    def kept_bytes(self) -> int:
        """Payload bytes that are kept until they are acknowledged."""
        return self._sent_bytes - self._acked_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(kind, value, trace)

    async def open(self) -> pb.PushAccepted:
        """Connects and waits for the receiver's acceptance.

        Raises:
            Unavailable: There is no connection; one that was never there is not waited for.
            HmaError: The receiver refuses.
        """
        self._call = await self._exit.enter_async_context(self._new_call(wait_for_ready=False))
        try:
            return await self._call.open(self._open_frame(resume=False))
        except StreamLost as lost:
            raise gone(self._address, str(lost)) from lost

    async def await_credit(self, payload_bytes: int) -> None:
        """Waits until the receiver lets us send so many more payload bytes."""
        total = self._sent_bytes + payload_bytes
        await self._resuming(lambda call: call.await_credit(total))

    async def send_block(self, frame: bytes, payload_bytes: int) -> None:
        """Hands over one block's frame, for which `await_credit` was awaited; returns when gRPC has taken it."""
        self._kept.append((frame, payload_bytes))
        self._sent_bytes += payload_bytes
        try:
            await self._call.write(frame)
        except StreamLost as lost:
            # What is kept is sent again, this block included.
            await self._resume(lost)

    async def finish(self, frame: bytes) -> pb.PushCommitted:
        """Sends the `PushEnd` frame, waits for the commit and lets the receiver end the stream."""
        committed = await self._resuming(lambda call: call.finish(frame))
        if (committed.blocks, committed.payload_bytes) != (self._sent_blocks, self._sent_bytes):
            raise broken(
                self._address,
                f"it committed {committed.blocks} blocks with {committed.payload_bytes} bytes of "
                f"{self._sent_blocks} with {self._sent_bytes}",
            )
        return committed

    @property
    def _sent_blocks(self) -> int:
        return self._acked_blocks + len(self._kept)

    async def _resuming(self, work: Callable[[PushCall], Awaitable[Result]]) -> Result:
        """Does what can be done again on another call."""
        while True:
            try:
                return await work(self._call)
            except StreamLost as lost:
                await self._resume(lost)

    async def _resume(self, lost: StreamLost) -> None:
        """Gets a new call to where the lost one was.

        Raises:
            Unavailable: It did not come back in time, or has lost what it had acknowledged.
        """
        if self._acked_blocks > self._resumed_at:
            # Only progress buys more time: a connection that dies under the same block again and again ends.
            self._resumed_at = self._acked_blocks
            self._give_up = time.monotonic() + self._patience.resume
        while (left := self._give_up - time.monotonic()) > 0:
            _log.warning("decode at %s: %s; resuming from block %d", self._address, lost, self._acked_blocks)
            try:
                await self._go_on(left)
                return
            except StreamLost as again:
                lost = again
            except Unavailable as exc:
                self._guard.check()
                raise gone(self._address, f"{lost}; {exc.message}") from exc
            await self._guard.wait(asyncio.sleep(_PAUSE_SECONDS), "a new connection")
        raise gone(self._address, str(lost))

    async def _go_on(self, limit: float) -> None:
        await self._exit.aclose()
        self._call = await self._exit.enter_async_context(self._new_call(wait_for_ready=True))
        accepted = await self._call.open(self._open_frame(resume=True), limit=limit)
        if accepted.blocks < self._acked_blocks:
            lacks = f"it has {accepted.blocks} of the {self._acked_blocks} blocks that it acknowledged"
            raise gone(self._address, lacks)
        self._forget(accepted.blocks)
        total = self._acked_bytes
        for frame, payload_bytes in list(self._kept):
            total += payload_bytes
            await self._call.await_credit(total)
            await self._call.write(frame)

    def _new_call(self, *, wait_for_ready: bool) -> PushCall:
        return PushCall(
            self._channel,
            self._address,
            self._guard,
            stall_timeout=self._patience.stall,
            take_ack=self._take_ack,
            wait_for_ready=wait_for_ready,
        )

    def _open_frame(self, *, resume: bool) -> bytes:
        self._opening.resume = resume
        return encode_frame(pb.PushHeader(open=self._opening))

    def _take_ack(self, ack: pb.PushAck) -> None:
        if ack.blocks < self._acked_blocks:
            raise broken(self._address, f"it acknowledged {ack.blocks} blocks after {self._acked_blocks}")
        self._forget(ack.blocks)

    def _forget(self, blocks: int) -> None:
        """Lets go of what the receiver has."""
        if blocks > self._sent_blocks:
            raise broken(self._address, f"it acknowledged {blocks} blocks of {self._sent_blocks}")
        while self._acked_blocks < blocks:
            _, payload_bytes = self._kept.popleft()
            self._acked_blocks += 1
            self._acked_bytes += payload_bytes
