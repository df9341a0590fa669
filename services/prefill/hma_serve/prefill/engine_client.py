"""The front's side of the engine: submits jobs, hands each job's events to whoever waits for them, notices its death.

Commands are queued at once and written by one task in their order, so a cancelled request can neither lose its close
nor overtake its own submit. A job's close is sent on every way out of `job`; after it the front reads none of its
slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence

from hma_serve.core.error_detail import from_error_detail
from hma_serve.core.errors import HmaError, Internal, ResourceExhausted, Unavailable
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import EngineProcess, LinkClosed
from hma_serve.prefill.guard import Guard

MAX_QUEUED_COMMANDS = 4096
"""Commands that may wait for an engine in the middle of a layer before new jobs are refused."""


class EngineJob:
    """One job's events, in order; bounded by the layers that the engine hands out before any is reported as sent."""

    def __init__(self, job_id: int, guard: Guard, commands: asyncio.Queue[pb.PrefillEngineCommand]) -> None:
        self.job_id = job_id
        self._guard = guard
        self._commands = commands
        self._events: asyncio.Queue[pb.PrefillEngineEvent] = asyncio.Queue()

    def put(self, event: pb.PrefillEngineEvent) -> None:
        """For the client: an event of this job."""
        if event.HasField("failed"):
            self._guard.fail(from_error_detail(event.failed.error))
        else:
            self._events.put_nowait(event)

    def fail(self, error: HmaError) -> None:
        """For the client: no event will come any more."""
        self._guard.fail(error)

    async def started(self) -> pb.PrefillStarted:
        """Waits until the job leaves the engine's queue."""
        return (await self._next("the start of the computation")).started

    async def next_layer(self) -> pb.PrefillLayerDone:
        """Waits for the next layer; its slot is ours until `layer_sent`."""
        return (await self._next("the computation")).layer

    def layer_sent(self) -> None:
        """Gives the oldest layer's slot back."""
        self._commands.put_nowait(pb.PrefillEngineCommand(sent=pb.PrefillLayerSent(job=self.job_id)))

    async def _next(self, what: str) -> pb.PrefillEngineEvent:
        if not self._events.empty():
            self._guard.check()
            return self._events.get_nowait()
        return await self._guard.wait(self._events.get(), what)


class EngineClient:
    """Speaks with one engine process; `run` must be running meanwhile.

    Args:
        process: The engine.
    """

    def __init__(self, process: EngineProcess[pb.PrefillEngineEvent]) -> None:
        self._process = process
        self._commands: asyncio.Queue[pb.PrefillEngineCommand] = asyncio.Queue()
        self._jobs: dict[int, EngineJob] = {}
        self._ids = itertools.count(1)
        self._ready: asyncio.Future[pb.PrefillReady] = asyncio.get_running_loop().create_future()
        self._death: HmaError | None = None
        self._discarded_layers = 0

    @property
    def discarded_layers(self) -> int:
        """Layers that came when their job was closed already: what cancellations cost."""
        return self._discarded_layers

    async def ready(self) -> pb.PrefillReady:
        """Waits until the weights are loaded.

        Raises:
            HmaError: Why the engine cannot serve.
        """
        return await asyncio.shield(self._ready)

    async def run(self) -> HmaError:
        """Moves commands and events until the engine is gone; fails what is open and returns why."""
        writer = asyncio.create_task(self._write())
        try:
            async for event in self._process.link:
                self._dispatch(event)
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            self._die(Unavailable("the prefill engine is gone; another worker can take the request"))
        return self._death or Internal("the engine ended without a reason")

    @contextlib.contextmanager
    def job(
        self,
        token_ids: Sequence[int],
        *,
        token_start: int,
        due: float,
        priority: int,
        tenant: str,
        guard: Guard,
    ) -> Iterator[EngineJob]:
        """Submits a job on entry, closes it on exit; `due` is when its first token is, monotonic seconds.

        Raises:
            Unavailable: The engine is gone.
            ResourceExhausted: It has not taken the commands of the last seconds yet.
        """
        if self._death is not None:
            raise self._death
        if self._commands.qsize() >= MAX_QUEUED_COMMANDS:
            raise ResourceExhausted("the prefill engine is busy", retry_after=1.0)
        job = EngineJob(next(self._ids), guard, self._commands)
        submit = pb.PrefillSubmit(
            job=job.job_id,
            token_ids=token_ids,
            token_start=token_start,
            due_ns=int(min(due, guard.deadline) * 1e9),
            priority=priority,
            tenant=tenant,
        )
        self._jobs[job.job_id] = job
        self._commands.put_nowait(pb.PrefillEngineCommand(submit=submit))
        try:
            yield job
        finally:
            del self._jobs[job.job_id]
            self._commands.put_nowait(pb.PrefillEngineCommand(close=pb.PrefillClose(job=job.job_id)))

    def _dispatch(self, event: pb.PrefillEngineEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "ready":
            self._ready.set_result(event.ready)
            return
        job_id: int = getattr(event, kind).job if kind else 0
        if kind == "failed" and job_id == 0:
            self._die(from_error_detail(event.failed.error))
        elif (job := self._jobs.get(job_id)) is not None:
            job.put(event)
        elif kind == "layer":
            # Closed while the event was on its way; the engine frees the slot when it reads the close.
            self._discarded_layers += 1

    async def _write(self) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                await self._process.link.send(await self._commands.get())

    def _die(self, error: HmaError) -> None:
        """The first reason counts."""
        if self._death is not None:
            return
        self._death = error
        for job in self._jobs.values():
            job.fail(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            # Nobody may be waiting for it any more.
            self._ready.exception()
