"""How busy this instance is, as routers watch it: what the engine last said, and whether the worker is leaving."""

from __future__ import annotations

from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.v1 import worker_pb2
from hma_serve.worker import WatchedLoad


class Load(WatchedLoad):
    """The gauges; confined to one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = 0
        self.kv_capacity_tokens = 0
        self.engine = decode_engine_pb2.DecodeEngineLoad()

    @property
    def requests(self) -> int:
        """Open calls of Generate."""
        return self.streams

    def snapshot(self) -> worker_pb2.WorkerLoad:
        """The gauges now."""
        engine = self.engine
        return worker_pb2.WorkerLoad(
            state=self.state,
            running=engine.running,
            waiting=engine.waiting,
            kv_used_tokens=engine.kv_used_tokens,
            kv_capacity_tokens=self.kv_capacity_tokens,
            kv_free_tokens=engine.kv_free_tokens,
            context_tokens=engine.context_tokens,
            step_seconds=engine.step_seconds,
            cost=engine.cost,
            engine_silent_seconds=self.engine_silent_seconds(),
        )

    def engine_said(self, engine: decode_engine_pb2.DecodeEngineLoad) -> None:
        """The engine's load has come."""
        self.engine = engine
        self.notify()

    def stream_opened(self) -> None:
        """A call of Generate has begun."""
        self.streams += 1
        self.notify()

    def stream_closed(self) -> None:
        """It is over."""
        self.streams -= 1
        self.notify()
