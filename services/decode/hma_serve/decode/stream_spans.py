"""Spans of one Generate call, told by the responses that pass: the wait for KV, the first step, the other steps."""

from __future__ import annotations

import time

from hma_serve.telemetry import spans
from hma_serve.telemetry.tracing import Trace
from hma_serve.v1 import decode_pb2


class StreamSpans:
    """Watches the responses of one call.

    Args:
        trace: Of the request.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._since_ns = time.monotonic_ns()
        self._phase: str | None = spans.DECODE_WAIT
        self._tokens = 0

    def passed(self, response: decode_pb2.DecodeGenerateResponse) -> None:
        """A response is about to leave."""
        match response.WhichOneof("event"):
            case "started":
                self._next(spans.DECODE_FIRST_STEP)
            case "tokens":
                if self._phase != spans.DECODE_STEPS:
                    self._next(spans.DECODE_STEPS)
                self._tokens += len(response.tokens.token_ids)

    def ended(self) -> None:
        """The call is over, for whatever reason."""
        self._next(None)

    def _next(self, phase: str | None) -> None:
        now = time.monotonic_ns()
        if self._phase is not None:
            count = {"tokens": self._tokens} if self._phase == spans.DECODE_STEPS else {}
            self._trace.record(self._phase, self._since_ns, now, **count)
        self._phase, self._since_ns = phase, now
