"""Traces without and with a collector, in one process."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.telemetry.tracing import Trace, exporting_traces
from hma_serve.v1 import common_pb2
from support.otlp_collector import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

SCRIPT = """
import asyncio, contextlib, time
from hma_serve.core.errors import ResourceExhausted
from hma_serve.telemetry.tracing import SpanKind, Trace, exporting_traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
with exporting_traces("router"):
    origin = Trace.of_headers({"traceparent": PARENT})
    now = time.monotonic_ns()
    with origin.span("outer", kind=SpanKind.SERVER, tokens=3, **{"gen_ai.request.model": "demo"}) as span:
        span.trace.record("past", now - 2_000_000_000, now - 1_000_000_000, bytes=7)
        with contextlib.suppress(ResourceExhausted), span.trace.span("full"):
            raise ResourceExhausted("no room", retry_after=1)
        with contextlib.suppress(asyncio.CancelledError), span.trace.span("left"):
            raise asyncio.CancelledError
        with contextlib.suppress(ValueError), span.trace.span("bug"):
            raise ValueError("secret")
        print(Trace.of_message(span.trace.to_message()).to_message().traceparent)
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, check=False
    )


def test_spans_hang_below_the_callers_and_carry_what_happened() -> None:
    with Collector() as collector:
        result = run(SCRIPT, OTEL_EXPORTER_OTLP_ENDPOINT=collector.address, POD_NAME="router-7")
        assert result.returncode == 0, result.stderr
        told = {span.name: span for span in collector.wait_for(lambda spans: len(spans) == 5)}
    outer = told["outer"]
    assert outer.service == "hma-serve-router"
    assert {span.trace_id for span in told.values()} == {PARENT.split("-")[1]}
    assert outer.parent_id == PARENT.split("-")[2]
    assert {span.parent_id for name, span in told.items() if name != "outer"} == {outer.span_id}
    assert result.stdout.strip() == f"00-{outer.trace_id}-{outer.span_id}-01"
    assert outer.attributes == {"hma.tokens": 3, "gen_ai.request.model": "demo"}
    assert told["past"].attributes == {"hma.bytes": 7}
    assert abs(told["past"].end_ns - told["past"].start_ns - 1_000_000_000) < 1_000
    assert told["past"].end_ns < outer.start_ns
    assert (told["full"].failed, told["full"].attributes["error.type"]) == (True, "resource_exhausted")
    assert (told["left"].failed, told["left"].attributes) == (False, {"hma.cancelled": True})
    assert (told["bug"].failed, told["bug"].attributes["error.type"]) == (True, "ValueError")


def test_a_collector_that_is_gone_holds_nobody_up() -> None:
    result = run(SCRIPT, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_without_an_endpoint_the_callers_place_is_passed_on() -> None:
    trace = Trace.of_headers({"traceparent": PARENT, "tracestate": "a=1"})
    with exporting_traces("router"), trace.span("outer") as span:
        span.set(tokens=1)
        span.trace.record("past", 0, 1)
        assert span.trace.to_message() == common_pb2.TraceContext(traceparent=PARENT, tracestate="a=1")


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 9999])
def test_a_malformed_place_is_none(header: str) -> None:
    assert Trace.of_headers({"traceparent": header}).to_message() == common_pb2.TraceContext()


def test_an_unknown_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(InvalidArgument, match="grpc or http/protobuf"), exporting_traces("router"):
        pass


async def test_tasks_do_not_share_a_place() -> None:
    """Two requests on one loop: what one opens is never the other's parent."""
    origins = [Trace.of_headers({"traceparent": PARENT.replace("b7", f"{n:02x}")}) for n in (1, 2)]

    async def request(origin: Trace) -> str:
        with origin.span("outer") as span:
            await asyncio.sleep(0)
            return span.trace.to_message().traceparent

    assert await asyncio.gather(*map(request, origins)) == [o.to_message().traceparent for o in origins]
