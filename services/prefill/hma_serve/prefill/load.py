"""How busy this instance is: what routers watch, what admission refuses by, and the estimate of the queue's length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hma_serve.core.calibration import StepCalibration, TransferCalibration
from hma_serve.v1 import worker_pb2
from hma_serve.worker import WatchedLoad

_SMOOTHING = 0.2


class Load(WatchedLoad):
    """Counts requests and tokens, and learns what they cost; confined to one event loop.

    Attributes:
        running: Requests that left the queue.
        waiting: Requests in the queue.
        queued_tokens: Of both, not computed yet.
        token_seconds: Running mean of a token's computation.
        steps: What chunks take.
        transfer: What transfers take; None until the model is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = 0
        self.waiting = 0
        self.queued_tokens = 0
        self.token_seconds = 0.0
        self.steps = StepCalibration(0)
        self.transfer: TransferCalibration | None = None
        self._open: set[RequestLoad] = set()

    def expect(self, *, chunk_tokens: int, bytes_per_token: int, layers: int) -> None:
        """Tells how prompts are cut and packed, before the first one comes."""
        self.steps = StepCalibration(chunk_tokens)
        self.transfer = TransferCalibration(bytes_per_token, layers)

    @property
    def requests(self) -> int:
        """Accepted and not ended."""
        return self.running + self.waiting

    @property
    def queue_seconds(self) -> float:
        """Estimate of when a request that came now would start."""
        cost = self.steps.cost
        if not cost.known:
            return self.queued_tokens * self.token_seconds
        return sum(cost.prompt(request.tokens, request.before) for request in self._open)

    @contextlib.contextmanager
    def request(self, tokens: int) -> Iterator[RequestLoad]:
        """Counts a request while the context lasts, as waiting at first."""
        request = RequestLoad(self, tokens)
        self._open.add(request)
        self.waiting += 1
        self.queued_tokens += tokens
        self.notify()
        try:
            yield request
        finally:
            self._open.discard(request)
            request.end()

    def snapshot(self) -> worker_pb2.WorkerLoad:
        """The gauges now."""
        cost = self.steps.cost
        return worker_pb2.WorkerLoad(
            state=self.state,
            running=self.running,
            waiting=self.waiting,
            queued_tokens=self.queued_tokens,
            token_seconds=self.token_seconds,
            queue_seconds=self.queue_seconds,
            cost=cost.to_proto() if cost.known else None,
            transfer=None if self.transfer is None else self.transfer.cost.to_proto(),
            engine_silent_seconds=self.engine_silent_seconds(),
        )


class RequestLoad:
    """One request's share of the load.

    Attributes:
        tokens: Not computed yet.
        before: Computed, or found in a cache.
    """

    def __init__(self, load: Load, tokens: int) -> None:
        self.tokens = tokens
        self.before = 0
        self._load = load
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
        load.steps.note_chunk(tokens, self.before, seconds)
        self._advance(tokens)
        rate = seconds / tokens
        load.token_seconds += (rate - load.token_seconds) * (_SMOOTHING if load.token_seconds else 1.0)
        load.notify()

    def skipped(self, tokens: int) -> None:
        """A cache held so many of its first tokens: they cost nothing."""
        self._advance(tokens)
        self._load.notify()

    def transferred(self, sent_bytes: int, *, sending: float, computing: float, exposed: float) -> None:
        """Its KV is with decode; see `TransferCalibration.note`."""
        if (transfer := self._load.transfer) is not None:
            tokens = sent_bytes // max(1, transfer.bytes_per_token)
            transfer.note(tokens, sent_bytes, sending, computing, exposed)

    def _advance(self, tokens: int) -> None:
        self.tokens -= tokens
        self.before += tokens
        self._load.queued_tokens -= tokens

    def end(self) -> None:
        """It is gone, whatever is left of it."""
        if self._running:
            self._load.running -= 1
        else:
            self._load.waiting -= 1
        self._load.queued_tokens -= self.tokens
        self._load.notify()
