"""The Prefill service: accepts or refuses at once, then carries one request from the engine to decode.

One coroutine per request does everything in order, so its caller's cancellation, its deadline, decode's refusal and the
engine's death all end the same code, and leaving it frees everything: the transfer is cancelled, the engine's job
closed. Sending is part of that coroutine on purpose: while it waits for a slow decode, the engine's window for this
request fills and the request is parked, and no other request notices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio

from hma_serve.core.errors import DeadlineExceeded, HmaError
from hma_serve.internal.v1 import prefill_engine_pb2 as engine_pb
from hma_serve.prefill.admission import Admission
from hma_serve.prefill.engine_client import EngineClient, EngineJob
from hma_serve.prefill.events import LayerEvents
from hma_serve.prefill.guard import Guard
from hma_serve.prefill.layer_spans import LayerSpans
from hma_serve.prefill.load import Load, RequestLoad
from hma_serve.prefill.streamer import Destination, Streamer, Transfers
from hma_serve.rpc import remaining
from hma_serve.telemetry import spans
from hma_serve.telemetry.metrics import PrefillMetrics
from hma_serve.telemetry.tracing import Attribute, SpanKind, Trace
from hma_serve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

_log = logging.getLogger(__name__)

DEFAULT_DEADLINE = 600.0
"""Seconds that a request without a deadline may take."""


@dataclass(frozen=True, slots=True)
class FrontParts:
    """What the servicer works with; all of it lives longer.

    Attributes:
        instance: This process's name in the registry.
        admission: Its limits.
        load: Its gauges.
        engine: The compute process.
        transfers: To decode.
        events: Record of the pipeline's order, usually off.
        metrics: Prometheus.
    """

    instance: str
    admission: Admission
    load: Load
    engine: EngineClient
    transfers: Transfers
    events: LayerEvents
    metrics: PrefillMetrics


class PrefillServicer(prefill_pb2_grpc.PrefillServicer):
    """Serves `hma_serve.v1.Prefill`."""

    def __init__(self, parts: FrontParts) -> None:
        self._parts = parts
        self._guards: set[Guard] = set()
        parts.metrics.discarded_layers.set_function(lambda: parts.engine.discarded_layers)

    def fail_all(self, error: HmaError) -> int:
        """Ends every request with `error`; returns how many there were."""
        for guard in self._guards:
            guard.fail(error)
        return len(self._guards)

    async def Prefill(  # noqa: N802
        self,
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse],
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """See the schema."""
        outcome = "cancelled"
        origin, attributes = Trace.of_message(request.context.trace), _attributes(request)
        try:
            with origin.span(spans.PREFILL, kind=SpanKind.SERVER, **attributes) as span:
                async for response in self._serve(request, context.time_remaining(), span.trace):
                    if response.HasField("completed"):
                        # Said first: whoever has read the end may hang up before this call sees its own.
                        outcome = "ok"
                    yield response
        except HmaError as exc:
            outcome = exc.code
            _log.info("request %s: %s", request.context.request_id, exc.message)
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._parts.metrics.requests.labels(outcome).inc()

    async def _serve(
        self, request: prefill_pb2.PrefillRequest, call_seconds: float | None, trace: Trace
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        parts = self._parts
        parts.admission.check(request)
        parts.admission.require_room(parts.load)
        seconds = remaining(request.context, call_seconds)
        if seconds is not None and seconds <= 0:
            raise DeadlineExceeded("the deadline passed before the request arrived")
        guard = Guard(DEFAULT_DEADLINE if seconds is None else seconds)
        queue_seconds = parts.load.queue_seconds
        self._guards.add(guard)
        try:
            with (
                parts.load.request(len(request.token_ids)) as load,
                parts.engine.job(
                    request.token_ids,
                    token_start=request.token_start,
                    due=_due(request.context, guard),
                    priority=request.context.priority,
                    tenant=request.context.tenant,
                    guard=guard,
                ) as job,
            ):
                accepted = prefill_pb2.PrefillAccepted(instance=parts.instance, queue_seconds=queue_seconds)
                yield prefill_pb2.PrefillResponse(accepted=accepted)
                async for response in _Transfer(parts, request, guard, job, load, trace).run():
                    yield response
        finally:
            self._guards.discard(guard)


def _attributes(request: prefill_pb2.PrefillRequest) -> dict[str, Attribute]:
    context = request.context
    return {"request_id": context.request_id, "epoch": context.epoch, "prompt_tokens": len(request.token_ids)}


class _Transfer:
    """One accepted request from its start in the engine to decode's commit."""

    def __init__(
        self,
        parts: FrontParts,
        request: prefill_pb2.PrefillRequest,
        guard: Guard,
        job: EngineJob,
        load: RequestLoad,
        trace: Trace,
    ) -> None:
        self._parts = parts
        self._request = request
        self._guard = guard
        self._job = job
        self._load = load
        self._trace = trace
        self._spans = LayerSpans(trace, parts.transfers.layout.layers)
        self._submitted_ns = time.monotonic_ns()
        self._compute_ns = 0
        self._chunk_ns = 0
        self._cached_tokens = 0
        self._sending_ns = 0

    async def run(self) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        request, metrics = self._request, self._parts.metrics
        started = await self._job.started()
        self._load.started()
        queue_seconds = (started.at_ns - self._submitted_ns) / 1e9
        metrics.queue_seconds.observe(queue_seconds)
        self._trace.record(spans.PREFILL_QUEUE, self._submitted_ns, started.at_ns)
        tokens = len(request.token_ids)
        streamer = Streamer(
            self._parts.transfers,
            Destination(request.decode_address, request.ticket, request.context.epoch),
            token_start=request.token_start,
            token_count=tokens - request.token_start,
            agreement=request.agreement if request.HasField("agreement") else None,
            guard=self._guard,
            trace=self._trace.to_message(),
        )
        async with streamer:
            computed = 0
            while computed < tokens:
                layer = await self._next_layer(streamer)
                if layer.layer == self._parts.transfers.layout.layers - 1:
                    computed = layer.chunk_start + layer.chunk_tokens
                    self._chunk_done(layer)
                    progress = prefill_pb2.PrefillProgress(computed_tokens=computed)
                    yield prefill_pb2.PrefillResponse(progress=progress)
            await streamer.commit()
            # Of a prompt that was found in the cache nothing was computed: all of its transfer is exposed.
            exposed_seconds = (time.monotonic_ns() - (layer.computed_ns or started.at_ns)) / 1e9
        if not layer.cached:
            self._load.transferred(
                streamer.sent_bytes,
                sending=self._sending_ns / 1e9,
                computing=self._compute_ns / 1e9,
                exposed=exposed_seconds,
            )
        metrics.exposed_transfer_seconds.observe(exposed_seconds)
        metrics.compute_seconds.observe(self._compute_ns / 1e9)
        completed = prefill_pb2.PrefillCompleted(
            computed_tokens=tokens - self._cached_tokens,
            cached_tokens=self._cached_tokens,
            payload_bytes=streamer.sent_bytes,
            queue_seconds=max(0.0, queue_seconds),
            compute_seconds=self._compute_ns / 1e9,
            exposed_transfer_seconds=exposed_seconds,
        )
        yield prefill_pb2.PrefillResponse(completed=completed)

    async def _next_layer(self, streamer: Streamer) -> engine_pb.PrefillLayerDone:
        """Sends one layer and gives its slot back."""
        layer = await self._job.next_layer()
        sent_before, began = streamer.sent_bytes, time.monotonic_ns()
        await streamer.send_layer(layer)
        ended, sent = time.monotonic_ns(), streamer.sent_bytes - sent_before
        self._sending_ns += ended - began
        self._spans.left(layer, began, ended, sent)
        if layer.token_count:
            self._parts.events.layer_left(self._request.context.request_id, layer)
            self._job.layer_sent()
        self._parts.metrics.kv_sent_bytes.inc(sent)
        self._compute_ns += layer.compute_ns
        self._chunk_ns += layer.compute_ns
        return layer

    def _chunk_done(self, layer: engine_pb.PrefillLayerDone) -> None:
        if layer.cached:
            self._cached_tokens += layer.chunk_tokens
            self._load.skipped(layer.chunk_tokens)
            self._parts.metrics.cached_tokens.inc(layer.chunk_tokens)
            return
        self._load.computed(layer.chunk_tokens, self._chunk_ns / 1e9)
        self._parts.metrics.tokens.inc(layer.chunk_tokens)
        self._chunk_ns = 0


def _due(context: common_pb2.RequestContext, guard: Guard) -> float:
    """When the first token is wanted; whoever names no objective waits as long as its deadline allows."""
    if context.HasField("slo") and context.slo.HasField("ttft_seconds"):
        return time.monotonic() + context.slo.ttft_seconds
    return guard.deadline
