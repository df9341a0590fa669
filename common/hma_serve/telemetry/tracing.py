"""Traces by OpenTelemetry: one per request, across all processes.

A request outlives calls and tasks, and parts of it are told by engines after the fact, so the place in the trace is an
explicit value (`Trace`) that travels with the request, never ambient state. Without an OTLP endpoint in the environment
nothing is recorded and a span costs next to nothing; what a client sent is passed on all the same.

Span names stand in `spans`. The environment is OpenTelemetry's: `OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_EXPORTER_OTLP_PROTOCOL` (`grpc` or `http/protobuf`), `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME` and so on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
    OTEL_SDK_DISABLED,
    OTEL_SERVICE_NAME,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hma_serve.core.errors import HmaError, InvalidArgument
from hma_serve.v1 import common_pb2

__all__ = ["Attribute", "Span", "SpanKind", "Trace", "exporting_traces"]

Attribute = str | bool | int | float

_TRACEPARENT, _TRACESTATE = "traceparent", "tracestate"
_MAX_HEADER_CHARS = 512
_FLUSH_MS = 2_000

_propagator = TraceContextTextMapPropagator()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a request stands in its trace: new spans hang below it.

    Attributes:
        context: OpenTelemetry's; empty: a new trace begins with the next span.
    """

    context: Context = field(default_factory=Context)

    @classmethod
    def of_headers(cls, headers: Mapping[str, str]) -> Trace:
        """The caller's place, from W3C's headers (or metadata, in lower case); what is malformed is ignored."""
        carrier = {
            name: headers[name]
            for name in (_TRACEPARENT, _TRACESTATE)
            if len(headers.get(name, "")) <= _MAX_HEADER_CHARS and name in headers
        }
        return cls(_propagator.extract(carrier, context=Context()))

    @classmethod
    def of_message(cls, message: common_pb2.TraceContext) -> Trace:
        """The caller's place, as internal messages carry it."""
        return cls.of_headers({_TRACEPARENT: message.traceparent, _TRACESTATE: message.tracestate})

    def to_message(self) -> common_pb2.TraceContext:
        """For internal messages."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context=self.context)
        return common_pb2.TraceContext(
            traceparent=carrier.get(_TRACEPARENT, ""), tracestate=carrier.get(_TRACESTATE, "")
        )

    @contextlib.contextmanager
    def span(self, name: str, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: Attribute) -> Iterator[Span]:
        """A span that lasts as long as the context; an error or a cancellation that leaves it is noted in it."""
        span = _tracer().start_span(name, self.context, kind, _named(attributes))
        try:
            yield Span(span, self.context)
        except (asyncio.CancelledError, GeneratorExit):
            span.set_attributes({"hma.cancelled": True})
            raise
        except Exception as exc:
            # What wraps a typed error says so with `error`; anything else is a bug, and its text stays in the log.
            cause: object = getattr(exc, "error", exc)
            typed = cause if isinstance(cause, HmaError) else None
            span.set_attribute("error.type", type(exc).__name__ if typed is None else typed.code)
            span.set_status(otel.StatusCode.ERROR, "internal error" if typed is None else typed.message)
            raise
        finally:
            span.end()

    def record(self, name: str, start_ns: int, end_ns: int, **attributes: Attribute) -> None:
        """A span of the past.

        Args:
            name: From `spans`.
            start_ns: CLOCK_MONOTONIC, which all processes of a host share.
            end_ns: Likewise.
            attributes: Names without a dot are ours and get the prefix `hma.`.
        """
        if not _recording():
            return
        offset = time.time_ns() - time.monotonic_ns()
        span = _tracer().start_span(name, self.context, attributes=_named(attributes), start_time=start_ns + offset)
        span.end(max(start_ns, end_ns) + offset)


@dataclass(frozen=True, slots=True)
class Span:
    """A span that is open."""

    _span: otel.Span
    _parent: Context

    @property
    def trace(self) -> Trace:
        """The place below this span; without recording, the caller's own."""
        if not self._span.get_span_context().is_valid:
            return Trace(self._parent)
        return Trace(otel.set_span_in_context(self._span, self._parent))

    def set(self, **attributes: Attribute) -> None:
        """Adds attributes."""
        self._span.set_attributes(_named(attributes))


@contextlib.contextmanager
def exporting_traces(role: str) -> Iterator[None]:
    """Exports this process's spans while the context lasts, if the environment names an endpoint.

    Args:
        role: Names the service where `OTEL_SERVICE_NAME` does not.

    Raises:
        InvalidArgument: The environment asks for a protocol that there is not.
    """
    if not _wanted():
        yield
        return
    resource = Resource.create(
        {
            "service.name": os.environ.get(OTEL_SERVICE_NAME) or f"hma-serve-{role}",
            "service.instance.id": os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
            "hma.role": role,
        }
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    otel.set_tracer_provider(provider)
    # An unreachable collector is told once by the exporter's warnings, not with a traceback for every batch.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
    _log.info("exporting traces")
    try:
        yield
    finally:
        provider.force_flush(_FLUSH_MS)
        provider.shutdown()


def _wanted() -> bool:
    endpoint = os.environ.get(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) or os.environ.get(OTEL_EXPORTER_OTLP_ENDPOINT)
    return bool(endpoint) and os.environ.get(OTEL_SDK_DISABLED, "").lower() != "true"


def _exporter() -> SpanExporter:
    protocol = os.environ.get(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL) or os.environ.get(OTEL_EXPORTER_OTLP_PROTOCOL, "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise InvalidArgument(
        f"{OTEL_EXPORTER_OTLP_PROTOCOL} is {protocol!r}; traces leave by grpc or http/protobuf",
        field=OTEL_EXPORTER_OTLP_PROTOCOL,
    )


def _tracer() -> otel.Tracer:
    return otel.get_tracer("hma_serve")


def _recording() -> bool:
    return isinstance(otel.get_tracer_provider(), TracerProvider)


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """Our own attributes get a prefix; those of OpenTelemetry's conventions come with their dots."""
    return {name if "." in name else f"hma.{name}": value for name, value in attributes.items()}
