"""What a decode worker makes of a request before its engine sees it."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from hma_serve.decode.admission import Admission
from hma_serve.decode.front import DecodeServicer
from hma_serve.decode.load import Load
from hma_serve.kvblock import Acceptance
from hma_serve.telemetry.metrics import decode_metrics
from hma_serve.v1 import common_pb2, decode_pb2, kv_block_pb2
from support.deadlines import deadline_in


def deadline_after(context: common_pb2.RequestContext, call_seconds: float | None) -> float:
    """Seconds until the engine gives the request up; infinite when it never does."""
    admission = Admission(100, 100, cast(Acceptance, None), kv_block_pb2.KvSupport())
    request = decode_pb2.DecodeGenerateRequest(context=context, prompt_token_ids=[1, 2])
    admit, _ = admission.check(request, call_seconds)
    return (admit.deadline_ns - time.monotonic_ns()) / 1e9 if admit.deadline_ns else float("inf")


def test_the_engine_gives_up_with_the_call_or_at_the_moment_that_the_request_names() -> None:
    unnamed, named = common_pb2.RequestContext(), common_pb2.RequestContext(deadline=deadline_in(500))
    assert deadline_after(unnamed, None) == float("inf")
    assert 0 < deadline_after(unnamed, 60.0) <= 60
    assert 0 < deadline_after(named, 60.0) <= 60
    assert 60 < deadline_after(named, None) <= 500


async def test_a_bug_of_ours_is_counted_as_one() -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    registry, load = CollectorRegistry(), Load()
    admission: Any = SimpleNamespace(check=broken)
    servicer = DecodeServicer(cast(Any, None), admission, load, decode_metrics(registry))
    context: Any = SimpleNamespace(time_remaining=lambda: None)
    with pytest.raises(ZeroDivisionError):
        await anext(servicer.Generate(decode_pb2.DecodeGenerateRequest(), context))
    assert registry.get_sample_value("hma_decode_requests_total", {"outcome": "internal"}) == 1.0
    assert load.requests == 0
