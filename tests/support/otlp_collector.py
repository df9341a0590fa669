"""A collector for tests: the real OTLP protocol over gRPC, spans kept in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Told:
    """A span with the name of the service that told it."""

    def __init__(self, service: str, span: Span) -> None:
        self.service = service
        self.name = span.name
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.start_ns = span.start_time_unix_nano
        self.end_ns = span.end_time_unix_nano
        self.failed = span.status.code == span.status.STATUS_CODE_ERROR
        self.attributes = {item.key: _value(item.value) for item in span.attributes}

    def __repr__(self) -> str:
        return f"{self.service}:{self.name}"


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """`with Collector() as collector:`; `address` is for `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._changed = threading.Condition()
        self._spans: list[Told] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext) -> Any:
        with self._changed:
            for resource in request.resource_spans:
                names = {item.key: _value(item.value) for item in resource.resource.attributes}
                self._spans += [
                    Told(names["service.name"], span) for scope in resource.scope_spans for span in scope.spans
                ]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, satisfied: Callable[[list[Told]], bool], seconds: float = 30) -> list[Told]:
        """All spans so far, once they satisfy."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not satisfied(self._spans):
                left = deadline - time.monotonic()
                assert left > 0, f"after {seconds:g} s only these spans came: {self._spans}"
                self._changed.wait(left)
            return list(self._spans)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
