import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from hma_serve.core.errors import ERRORS, FailedPrecondition, HmaError, Internal, ResourceExhausted, Unavailable
from hma_serve.rpc import (
    GrpcServer,
    error_detail,
    from_error_detail,
    from_rpc_error,
    open_channel,
    remaining,
)
from hma_serve.v1 import decode_pb2, decode_pb2_grpc
from hma_serve.v1.common_pb2 import RequestContext
from support.deadlines import deadline_in


class Failing(decode_pb2_grpc.DecodeServicer):
    """Fails in the way that the test chooses."""

    def __init__(self) -> None:
        self.error: Exception = Internal("unset")
        self.cleaned_up = 0

    async def Extend(self, request: Any, context: Any) -> decode_pb2.ExtendResponse:
        return decode_pb2.ExtendResponse()

    async def Release(self, request: Any, context: Any) -> decode_pb2.ReleaseResponse:
        raise self.error

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        try:
            yield decode_pb2.DecodeGenerateResponse()
            raise self.error
        finally:
            self.cleaned_up += 1


@pytest.fixture
async def served() -> AsyncIterator[tuple[Failing, grpc.aio.Channel, str]]:
    servicer = Failing()
    server = GrpcServer("decode", "127.0.0.1:0", ["hma_serve.v1.Decode"])
    decode_pb2_grpc.add_DecodeServicer_to_server(servicer, server.server)
    address = await server.start()
    channel = open_channel(address)
    yield servicer, channel, address
    await channel.close()
    await server.stop(0)


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
async def test_every_typed_error_crosses_grpc_whole(
    kind: type[HmaError], served: tuple[Failing, grpc.aio.Channel, str]
) -> None:
    servicer, channel, _ = served
    servicer.error = kind("do this instead", field="max_tokens", retry_after=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode_pb2_grpc.DecodeStub(channel).Release(decode_pb2.ReleaseRequest())
    assert caught.value.code().name == kind.grpc_status
    error = from_rpc_error(caught.value)
    assert type(error) is kind
    assert (error.message, error.field, error.retry_after) == ("do this instead", "max_tokens", 1.5)


async def test_overload_tells_any_grpc_client_when_to_retry(served: tuple[Failing, grpc.aio.Channel, str]) -> None:
    servicer, channel, _ = served
    servicer.error = ResourceExhausted("full", retry_after=2.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode_pb2_grpc.DecodeStub(channel).Release(decode_pb2.ReleaseRequest())
    status = rpc_status.from_call(cast(grpc.Call, caught.value))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.seconds == 2


async def test_a_stream_that_fails_midway_keeps_its_error_and_cleans_up(
    served: tuple[Failing, grpc.aio.Channel, str],
) -> None:
    servicer, channel, _ = served
    servicer.error = Unavailable("the engine is gone")
    call = decode_pb2_grpc.DecodeStub(channel).Generate(decode_pb2.DecodeGenerateRequest())
    responses = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in call:
            responses.append(response)
    assert len(responses) == 1
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert servicer.cleaned_up == 1


async def test_a_bug_is_internal_logged_and_keeps_its_text_to_itself(
    served: tuple[Failing, grpc.aio.Channel, str], caplog: pytest.LogCaptureFixture
) -> None:
    servicer, channel, _ = served
    servicer.error = KeyError("secret")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode_pb2_grpc.DecodeStub(channel).Release(decode_pb2.ReleaseRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())
    assert "secret" in caplog.text


async def test_a_dead_address_is_unavailable() -> None:
    channel = open_channel("127.0.0.1:1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode_pb2_grpc.DecodeStub(channel).Release(decode_pb2.ReleaseRequest(), timeout=5)
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    await channel.close()


async def test_a_taken_port_fails_with_a_sentence(served: tuple[Failing, grpc.aio.Channel, str]) -> None:
    _, _, address = served
    second = GrpcServer("decode", address, [])
    with pytest.raises(FailedPrecondition, match="cannot listen on"):
        await second.start()


async def test_health_follows_the_server(served: tuple[Failing, grpc.aio.Channel, str]) -> None:
    _, channel, _ = served
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "hma_serve.v1.Decode"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_method_that_is_left_out_is_unimplemented_and_no_bug(
    served: tuple[Failing, grpc.aio.Channel, str], caplog: pytest.LogCaptureFixture
) -> None:
    _, channel, _ = served
    call: Any = channel.unary_unary("/grpc.health.v1.Health/List")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not caplog.records


def test_a_deadline_is_absolute_and_absent_when_unset() -> None:
    context = RequestContext(deadline=deadline_in(100))
    left = remaining(context, None)
    assert left is not None
    assert 90 < left <= 100
    assert remaining(RequestContext(), None) is None


def test_a_calls_own_deadline_counts_as_well_and_asks_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    named = RequestContext(deadline=deadline_in(100))
    assert remaining(named, 50.0) == 50.0
    left = remaining(named, 500.0)
    assert left is not None
    assert left <= 100
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert remaining(RequestContext(), 50.0) == 50.0


def test_codes_of_newer_versions_become_internal() -> None:
    detail = error_detail(Unavailable("later"))
    detail.code = "not_yet_invented"
    assert type(from_error_detail(detail)) is Internal


def test_the_documented_errors_are_those_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(code, kind.grpc_status, str(kind.http_status)) for code, kind in ERRORS.items()]
