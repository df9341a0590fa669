"""How busy this instance is, as routers watch it: what the engine last said, and whether the worker is leaving."""

from __future__ import annotations

import asyncio
import contextlib

from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.v1 import worker_pb2


class Load:
    """The gauges; confined to one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.streams = 0
        self.kv_capacity_tokens = 0
        self.engine = decode_engine_pb2.DecodeEngineLoad()
        self._changed = asyncio.Event()

    def snapshot(self) -> worker_pb2.WorkerLoad:
        """The gauges now."""
        engine = self.engine
        return worker_pb2.WorkerLoad(
            state=worker_pb2.WORKER_STATE_DRAINING if self.draining else worker_pb2.WORKER_STATE_READY,
            running=engine.running,
            waiting=engine.waiting,
            kv_used_tokens=engine.kv_used_tokens,
            kv_capacity_tokens=self.kv_capacity_tokens,
            step_seconds=engine.step_seconds,
        )

    def stream_opened(self) -> None:
        """A call of Generate has begun."""
        self.streams += 1
        self.notify()

    def stream_closed(self) -> None:
        """It is over."""
        self.streams -= 1
        self.notify()

    def notify(self) -> None:
        """Wakes everyone in `changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()

    async def wait_idle(self, seconds: float) -> bool:
        """Waits until no call of Generate is open; False when that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.streams:
                    await self.changed()
        return not self.streams
