"""How busy an instance is, as far as watching and draining need to know; each service adds its own gauges."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Callable

from hma_serve.v1 import worker_pb2


class WatchedLoad(abc.ABC):
    """Gauges that wake those who wait for a change; confined to one event loop.

    Attributes:
        draining: The worker is leaving: admission refuses, and routers are told.
        engine_silent_seconds: Says for how long the engine has not answered.
    """

    def __init__(self) -> None:
        self.draining = False
        self.engine_silent_seconds: Callable[[], float] = lambda: 0.0
        self._changed = asyncio.Event()

    @property
    @abc.abstractmethod
    def requests(self) -> int:
        """Accepted and not ended; draining waits until it is 0."""

    @abc.abstractmethod
    def snapshot(self) -> worker_pb2.WorkerLoad:
        """The gauges now."""

    @property
    def state(self) -> worker_pb2.WorkerState.ValueType:
        """What routers are told: ready or draining."""
        return worker_pb2.WORKER_STATE_DRAINING if self.draining else worker_pb2.WORKER_STATE_READY

    def notify(self) -> None:
        """Wakes everyone in `changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()

    async def wait_idle(self, seconds: float) -> bool:
        """Waits until no request is left, for at most `seconds`; whether that came true."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.requests:
                    await self.changed()
        return not self.requests
