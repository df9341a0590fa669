"""Malformed gRPC: bytes that are no message, messages out of range, connections that are no gRPC.

Each gets the right status with a clear text; nothing is logged as an error, nothing is left behind, and the
next call works.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from hma_serve.router.grpc_api import SERVICE, InferenceServicer
from hma_serve.rpc import GrpcServer
from hma_serve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from support.fake_workers import VOCAB, FakeDecode, FakePrefill, running_pipeline

GENERATE = f"/{SERVICE}/Generate"
LIST = f"/{SERVICE}/ListModels"
PATIENCE = 15.0
INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
UNKNOWN_METHOD, LATE = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED


class Router:
    """A router's gRPC server over fake workers."""

    def __init__(self, address: str, channel: Any, decode: FakeDecode) -> None:
        host, _, port = address.rpartition(":")
        self.address = host, int(port)
        self.channel = channel
        self.decode = decode

    async def works(self) -> bool:
        call = self.channel.unary_stream(GENERATE)(request(), timeout=PATIENCE)
        responses = [inference_pb2.GenerateResponse.FromString(data) async for data in call]
        return "".join(response.delta.text for response in responses) == "abc"


def held() -> tuple[int, int]:
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def leak_free_router() -> AsyncIterator[Router]:
    """A router that must hold, afterwards, what it held before."""
    decode = FakeDecode()
    async with running_pipeline(FakePrefill(), decode) as (pipeline, _):
        server = GrpcServer("router", "127.0.0.1:0", [SERVICE])
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(pipeline.completions), server.server)
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            router = Router(address, channel, decode)
            assert await router.works()
            before = held()
            yield router
            assert await router.works()
            await decode.until_idle()
            await eventually(lambda: held() <= before)
            assert pipeline.completions.running == 0
        await server.stop(0)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  sockets close when the kernel says so
            await asyncio.sleep(0.01)


def request(**fields: Any) -> bytes:
    message = inference_pb2.GenerateRequest(**({"text": "abc"} | fields))
    if not message.stop.HasField("max_tokens"):
        message.stop.max_tokens = 3
    return message.SerializeToString()


def sampling(**fields: Any) -> bytes:
    return request(sampling=common_pb2.SamplingParams(**fields))


def stop(**fields: Any) -> bytes:
    return request(stop=common_pb2.StopConditions(**fields))


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def nested_kwargs(depth: int) -> bytes:
    """A conversation whose template_kwargs hold a list in a list in a list."""
    value = field(3, b"x")
    for _ in range(depth):
        value = field(6, field(1, value))
    return field(11, field(3, field(1, field(1, b"a") + field(2, value))))


BAD: dict[str, tuple[bytes, grpc.StatusCode]] = {
    "random bytes": (b"\xff" * 20, INVALID),
    "cut off": (request()[:-2], INVALID),
    "not utf-8": (field(2, b"\xff\xfe"), INVALID),
    "utf-16 surrogate": (field(2, b"\xed\xa0\x80"), INVALID),
    "another type": (b"\x10\x05", INVALID),
    "nothing": (b"", INVALID),
    "empty prompt": (request(text=""), INVALID),
    "empty chat": (field(11, b""), INVALID),
    "no role": (field(11, field(1, field(2, b"hi"))), INVALID),
    "nested": (nested_kwargs(3), INVALID),
    "nested too deeply to read": (nested_kwargs(500), INVALID),
    "unknown token": (request(token_ids=common_pb2.TokenIds(ids=[VOCAB])), INVALID),
    "longer than the window": (request(text="a" * 100_000), INVALID),
    "larger than a message may be": (request(text="a" * (8 << 20)), EXHAUSTED),
    "too many completions": (request(n=4_000_000_000), INVALID),
    "long id": (request(client_request_id="x" * 10_000), INVALID),
    "not a number": (sampling(temperature=float("nan")), INVALID),
    "infinite": (sampling(presence_penalty=float("inf")), INVALID),
    "negative top_p": (sampling(top_p=-1.0), INVALID),
    "too many logprobs": (sampling(logprobs=1000), INVALID),
    "too many biases": (sampling(logit_bias=dict.fromkeys(range(2000), 1.0)), INVALID),
    "no tokens": (stop(max_tokens=0), INVALID),
    "more tokens than the window": (stop(max_tokens=2**32 - 1), INVALID),
    "too many stop strings": (stop(max_tokens=3, stop_strings=["a"] * 100), INVALID),
    "empty stop string": (stop(max_tokens=3, stop_strings=[""]), INVALID),
    "negative objective": (
        request(slo=common_pb2.Slo(ttft_seconds=-1.0)),
        INVALID,
    ),
}


async def test_malformed_messages(caplog: pytest.LogCaptureFixture) -> None:
    async with leak_free_router() as router:
        for name, (data, expected) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                [answer async for answer in router.channel.unary_stream(GENERATE)(data, timeout=PATIENCE)]
            assert raised.value.code() is expected, (name, raised.value)
            assert raised.value.details(), name
            assert "Traceback" not in str(raised.value.details()), name
            assert await router.works(), name
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.channel.unary_unary(LIST)(b"\xff", timeout=PATIENCE)
        assert raised.value.code() is INVALID
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_malformed_calls() -> None:
    async with leak_free_router() as router:
        bomb = tuple((f"a{position}", "b" * 1000) for position in range(40))
        for method, metadata, expected in [
            (f"/{SERVICE}/Nothing", (), UNKNOWN_METHOD),
            ("/no.such.Service/Generate", (), UNKNOWN_METHOD),
            (GENERATE, bomb, EXHAUSTED),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                call = router.channel.unary_stream(method)(request(), timeout=PATIENCE, metadata=metadata)
                [answer async for answer in call]
            assert raised.value.code() is expected
            assert await router.works()


async def test_a_call_without_a_message_ends_with_its_deadline() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in list[bytes]():
            yield message

    async with leak_free_router() as router:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [answer async for answer in router.channel.stream_stream(GENERATE)(nothing(), timeout=0.3)]
        assert raised.value.code() is LATE


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(200),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"",
    ],
    ids=["http/1.1", "zeros", "tls", "bad frames", "preface alone", "nothing"],
)
async def test_connections_that_are_no_grpc_are_left_without_trace(data: bytes) -> None:
    async with leak_free_router() as router:
        for half_close in (True, False):
            reader, writer = await asyncio.open_connection(*router.address)
            writer.write(data)
            await writer.drain()
            assert await router.works()
            if half_close:
                writer.write_eof()
                async with asyncio.timeout(PATIENCE):
                    assert b"Traceback" not in await reader.read()
            writer.transport.abort()
