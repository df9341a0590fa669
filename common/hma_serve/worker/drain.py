"""Leaving without dropping anything: refuse what is new, finish what runs, then vanish from the registry.

The registration stays until the last request is done, marked as draining, so that routers see a worker that leaves and
not one that died. A decode worker goes on receiving KV of requests that hold a ticket meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from hma_serve.core.errors import HmaError, Unavailable
from hma_serve.core.worker import WorkerInfo, WorkerRole, WorkerState
from hma_serve.registry import Session
from hma_serve.worker.load import WatchedLoad

# A request that was failed needs a moment to unwind.
_UNWIND_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What became of the requests that ran when draining began."""

    finished: int
    cancelled: int


class Drain:
    """Drains once, however often it is asked to.

    Args:
        role: Of the worker, for messages.
        load: The instance's gauges.
        fail_requests: Ends every request with an error; returns how many there were.
        set_not_serving: Makes its server report that it is not serving.
    """

    def __init__(
        self,
        role: WorkerRole,
        load: WatchedLoad,
        *,
        fail_requests: Callable[[HmaError], int],
        set_not_serving: Callable[[], Awaitable[None]],
    ) -> None:
        self._role = role
        self._load = load
        self._fail_requests = fail_requests
        self._set_not_serving = set_not_serving
        self._info: WorkerInfo | None = None
        self._session: Session | None = None
        self._task: asyncio.Task[DrainResult] | None = None

    @property
    def done(self) -> bool:
        """Nothing runs and nothing will."""
        return self._task is not None and self._task.done()

    @property
    def info(self) -> WorkerInfo:
        """The record of this instance as it should be seen now.

        Raises:
            Unavailable: It has none yet.
        """
        found = self._info if self._session is None else self._session.info
        if found is None:
            raise Unavailable(f"this {self._role} worker is starting")
        return replace(found, state=WorkerState.DRAINING) if self._load.draining else found

    def registered(self, info: WorkerInfo, session: Session | None) -> None:
        """Tells under which record, and in which session (None: nowhere), the instance is known."""
        self._info, self._session = info, session

    async def run(self, grace: float) -> DrainResult:
        """Drains; what is left after `grace` seconds is cancelled. Later calls wait for the first."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(grace))
        return await asyncio.shield(self._task)

    async def _run(self, grace: float) -> DrainResult:
        load, session = self._load, self._session
        load.draining = True
        load.notify()
        await self._set_not_serving()
        if session is not None:
            session.update(self.info)
        before, cancelled = load.requests, 0
        if not await load.wait_idle(grace):
            cancelled = self._fail_requests(Unavailable(f"this {self._role} worker was told to leave"))
            await load.wait_idle(_UNWIND_SECONDS)
        if session is not None:
            await session.aclose()
        # Ends the streams of those who watch the load, once `done` is true.
        asyncio.get_running_loop().call_soon(load.notify)
        return DrainResult(before - cancelled, cancelled)
