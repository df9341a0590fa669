"""A front's or receiver's side of the engine: commands in order, events to whoever waits for them, death noticed.

Commands are queued at once and written by one task, so a cancelled call can neither lose its close nor overtake its own
admit. What is queued is bounded: calls by `MAX_QUEUED`, blocks by the arena's slots.

A stream's mailbox holds at most the tokens of one completion: a client that reads slowly finds them merged, and nobody
waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hma_serve.core.error_detail import from_error_detail
from hma_serve.core.errors import HmaError, Internal, ResourceExhausted, Unavailable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import AsyncLink, LinkClosed, SlotPool

MAX_QUEUED = 4096
"""Commands that may wait for an engine in the middle of a step before new calls are refused."""


class StreamMailbox:
    """What the engine says of one stream, merged until it is read."""

    def __init__(self) -> None:
        self._admitted: asyncio.Future[pb.DecodeAdmitted] = asyncio.get_running_loop().create_future()
        self._pending = pb.DecodeStreamOutput()
        self._failure: HmaError | None = None
        self._news = asyncio.Event()

    async def admitted(self) -> pb.DecodeAdmitted:
        """Waits for the ticket.

        Raises:
            HmaError: The request was refused.
        """
        return await asyncio.shield(self._admitted)

    async def outputs(self) -> AsyncIterator[pb.DecodeStreamOutput]:
        """Yields what has come since the last time, until it is finished.

        Raises:
            HmaError: The stream failed; what came before has been yielded.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            output, self._pending = self._pending, pb.DecodeStreamOutput()
            if output.ListFields():
                yield output
            if output.HasField("finished"):
                return
            if self._failure is not None:
                raise self._failure

    def take_admitted(self, admitted: pb.DecodeAdmitted) -> None:
        """For the client."""
        self._admitted.set_result(admitted)

    def take(self, output: pb.DecodeStreamOutput) -> None:
        """For the client: merging appends the tokens."""
        self._pending.MergeFrom(output)
        self._news.set()

    def fail(self, error: HmaError) -> None:
        """For the client: nothing more will come."""
        self._failure = self._failure or error
        _fail(self._admitted, error)
        self._news.set()


@dataclass(eq=False)
class PushMailbox:
    """What the engine says of one KV stream.

    Attributes:
        attached: Set when its ticket is its own.
        committed: Set when all of it is in pages.
        failure: Set to why it must end.
        landed_blocks: Blocks in their pages.
        landed_bytes: Their payloads.
        progress: Set whenever one of these has changed.
    """

    attached: asyncio.Event = field(default_factory=asyncio.Event)
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: asyncio.Future[HmaError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    landed_blocks: int = 0
    landed_bytes: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    def landed(self, length: int) -> None:
        """For the client: one block more."""
        self.landed_blocks += 1
        self.landed_bytes += length
        self.progress.set()

    def fail(self, error: HmaError) -> None:
        """For the client; the first reason counts."""
        if not self.failure.done():
            self.failure.set_result(error)


class EngineClient:
    """Speaks with one engine process; `run` must be running meanwhile.

    Args:
        link: To the engine, open.
        slots: Of the arena; each is released when the engine has emptied it.
        on_load: Told the engine's load.
        place: Of the link among all that the engine has.
        places: How many it has; it tells by a number modulo this whose a stream or push is.
    """

    def __init__(
        self,
        link: AsyncLink[pb.DecodeEngineEvent],
        slots: SlotPool,
        *,
        on_load: Callable[[pb.DecodeEngineLoad], None] = lambda load: None,
        place: int = 0,
        places: int = 1,
    ) -> None:
        self._link = link
        self._slots = slots
        self._on_load = on_load
        self._commands: asyncio.Queue[pb.DecodeEngineCommand] = asyncio.Queue()
        self._numbers = itertools.count(places + place, places)
        self._streams: dict[int, StreamMailbox] = {}
        self._pushes: dict[int, PushMailbox] = {}
        self._calls: dict[int, asyncio.Future[pb.DecodeTicketAnswer]] = {}
        self._ready: asyncio.Future[pb.DecodeReady] = asyncio.get_running_loop().create_future()
        self._death: HmaError | None = None

    async def ready(self) -> pb.DecodeReady:
        """Waits until the weights are loaded.

        Raises:
            HmaError: Why the engine cannot serve.
        """
        return await asyncio.shield(self._ready)

    async def run(self) -> HmaError:
        """Moves commands and events until the engine is gone; fails what is open and returns why."""
        writer = asyncio.create_task(self._write())
        try:
            async for event in self._link:
                self._dispatch(event)
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            self._die(Unavailable("the decode engine is gone; another worker can take the request"))
        return self._death or Internal("the engine ended without a reason")

    @contextlib.contextmanager
    def stream(self, admit: pb.DecodeAdmit) -> Iterator[StreamMailbox]:
        """Asks for admission on entry (`admit.stream` is filled in), frees everything on exit.

        Raises:
            Unavailable: The engine is gone.
            ResourceExhausted: It has not taken the last seconds' commands yet.
        """
        self._check_alive()
        admit.stream = next(self._numbers)
        mailbox = self._streams[admit.stream] = StreamMailbox()
        self._post(pb.DecodeEngineCommand(admit=admit))
        try:
            yield mailbox
        finally:
            del self._streams[admit.stream]
            self._post(pb.DecodeEngineCommand(close=pb.DecodeClose(stream=admit.stream)))

    @contextlib.contextmanager
    def push(self, attach: pb.DecodeAttach, blocks: int = 0, payload_bytes: int = 0) -> Iterator[PushMailbox]:
        """Asks for a ticket on entry (`attach.push` is filled in), gives it up on exit unless it was committed.

        Args:
            attach: Which ticket.
            blocks: That landed in earlier pushes of the same stream.
            payload_bytes: Of those.
        """
        self._check_alive()
        attach.push = next(self._numbers)
        mailbox = self._pushes[attach.push] = PushMailbox(landed_blocks=blocks, landed_bytes=payload_bytes)
        self._post(pb.DecodeEngineCommand(attach=attach))
        try:
            yield mailbox
        finally:
            del self._pushes[attach.push]
            self._post(pb.DecodeEngineCommand(detach=pb.DecodeDetach(push=attach.push)))

    def store(self, block: pb.DecodeBlock) -> None:
        """Hands over a filled slot; it is released when it comes back."""
        self._post(pb.DecodeEngineCommand(block=block))

    def end_push(self, push: int) -> None:
        """Asks for the commit."""
        self._post(pb.DecodeEngineCommand(end_push=pb.DecodeEndPush(push=push)))

    async def extend(self, nonce: bytes, epoch: int) -> float:
        """Renews a ticket's lease; returns its seconds.

        Raises:
            HmaError: There is no such ticket, or the engine is gone.
        """
        call = pb.DecodeTicketCall(call=next(self._numbers), nonce=nonce, epoch=epoch)
        return (await self._call(pb.DecodeEngineCommand(extend=call), call.call)).lease_ns / 1e9

    async def release(self, nonce: bytes, epoch: int) -> None:
        """Frees a ticket.

        Raises:
            HmaError: There is no such ticket, or the engine is gone.
        """
        call = pb.DecodeTicketCall(call=next(self._numbers), nonce=nonce, epoch=epoch)
        await self._call(pb.DecodeEngineCommand(release=call), call.call)

    def fail_streams(self, error: HmaError) -> int:
        """Ends every stream; returns how many there were."""
        for mailbox in self._streams.values():
            mailbox.fail(error)
        return len(self._streams)

    async def _call(self, command: pb.DecodeEngineCommand, number: int) -> pb.DecodeTicketAnswer:
        self._check_alive()
        answer: asyncio.Future[pb.DecodeTicketAnswer] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._post(command)
        try:
            result = await answer
        finally:
            del self._calls[number]
        if result.HasField("error"):
            raise from_error_detail(result.error)
        return result

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death
        if self._commands.qsize() >= MAX_QUEUED:
            raise ResourceExhausted("the decode engine is busy", retry_after=1.0)

    def _post(self, command: pb.DecodeEngineCommand) -> None:
        if self._death is None:
            self._commands.put_nowait(command)

    async def _write(self) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                await self._link.send(await self._commands.get())

    def _dispatch(self, event: pb.DecodeEngineEvent) -> None:
        """Events of streams and pushes that are gone were on their way when they went."""
        kind = event.WhichOneof("event")
        if kind == "step":
            for output in event.step.outputs:
                if (stream := self._streams.get(output.stream)) is not None:
                    stream.take(output)
        elif kind == "landed":
            self._slots.release(event.landed.slot)
            if (push := self._pushes.get(event.landed.push)) is not None:
                push.landed(event.landed.length)
        elif kind == "load":
            self._on_load(event.load)
        elif kind in ("admitted", "failed"):
            self._to_stream(event)
        elif kind in ("attached", "committed", "push_failed"):
            self._to_push(event)
        elif kind == "answer":
            if (call := self._calls.get(event.answer.call)) is not None and not call.done():
                call.set_result(event.answer)
        elif kind == "ready":
            self._ready.set_result(event.ready)
        elif kind == "died":
            self._die(from_error_detail(event.died.error))

    def _to_stream(self, event: pb.DecodeEngineEvent) -> None:
        if event.HasField("admitted"):
            if (stream := self._streams.get(event.admitted.stream)) is not None:
                stream.take_admitted(event.admitted)
        elif (stream := self._streams.get(event.failed.stream)) is not None:
            stream.fail(from_error_detail(event.failed.error))

    def _to_push(self, event: pb.DecodeEngineEvent) -> None:
        if event.HasField("push_failed"):
            if (push := self._pushes.get(event.push_failed.push)) is not None:
                push.fail(from_error_detail(event.push_failed.error))
        elif event.HasField("attached"):
            if (push := self._pushes.get(event.attached.push)) is not None:
                push.attached.set()
        elif (push := self._pushes.get(event.committed.push)) is not None:
            push.committed.set()

    def _die(self, error: HmaError) -> None:
        """The first reason counts."""
        if self._death is not None:
            return
        self._death = error
        for stream in self._streams.values():
            stream.fail(error)
        for push in self._pushes.values():
            push.fail(error)
        for call in self._calls.values():
            _fail(call, error)
        _fail(self._ready, error)


def _fail(future: asyncio.Future[Any], error: HmaError) -> None:
    """Nobody may be waiting for it any more, so its exception counts as seen."""
    if not future.done():
        future.set_exception(error)
        future.exception()
