"""How busy this instance is: what routers watch, what admission refuses by, and the estimate of the queue's length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hma_serve.v1 import worker_pb2
from hma_serve.worker import WatchedLoad

_SMOOTHING = 0.2


class Load(WatchedLoad):
    """Counts requests and tokens; confined to one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 0
        self.waiting = 0
        self.queued_tokens = 0
        self.token_seconds = 0.0

    @property
    def requests(self) -> int:
        """Accepted and not ended."""
        return self.running + self.waiting

    @property
    def queue_seconds(self) -> float:
        """Estimate of when a request that came now would start."""
        return self.queued_tokens * self.token_seconds

    @contextlib.contextmanager
    def request(self, tokens: int) -> Iterator[RequestLoad]:
        """Counts a request while the context lasts, as waiting at first."""
        request = RequestLoad(self, tokens)
        self.waiting += 1
        self.queued_tokens += tokens
        self.notify()
        try:
            yield request
        finally:
            request.end()

    def snapshot(self) -> worker_pb2.WorkerLoad:
        """The gauges now."""
        return worker_pb2.WorkerLoad(
            state=self.state,
            running=self.running,
            waiting=self.waiting,
            queued_tokens=self.queued_tokens,
            token_seconds=self.token_seconds,
        )


class RequestLoad:
    """One request's share of the load."""

    def __init__(self, load: Load, tokens: int) -> None:
        self._load = load
        self._tokens = tokens
        self._running = False

    def started(self) -> None:
        """It left the queue."""
        self._running = True
        self._load.waiting -= 1
        self._load.running += 1
        self._load.notify()

    def computed(self, tokens: int, seconds: float) -> None:
        """A chunk of it is done."""
        load = self._load
        self._tokens -= tokens
        load.queued_tokens -= tokens
        rate = seconds / tokens
        load.token_seconds += (rate - load.token_seconds) * (_SMOOTHING if load.token_seconds else 1.0)
        load.notify()

    def end(self) -> None:
        """It is gone, whatever is left of it."""
        if self._running:
            self._load.running -= 1
        else:
            self._load.waiting -= 1
        self._load.queued_tokens -= self._tokens
        self._load.notify()
