"""What is wrong with a request stays in it: raw bytes over real sockets to the router's HTTP server.

Each gets the right status in an error object, or its connection closed; nothing is logged as an error, nothing is left
behind (tasks, connections, descriptors, work on the workers), and the next request works.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hma_serve.core.worker import WorkerRole
from hma_serve.router.http.app import build_app
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.server import HttpServer
from support.fake_workers import FakeDecode, FakePrefill, fake_worker, running_pipeline

LIMITS = HttpLimits(
    max_body_bytes=32 << 10, body_timeout=0.3, write_timeout=0.3, idle_timeout=0.5, max_headers=64, max_connections=8
)
PATIENCE = 15.0
BODY = b'{"prompt": "abc", "max_tokens": 3}'
JSON = b"Content-Type: application/json\r\n"
SIZED = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Router:
    """A router's HTTP server over fake workers, and what it must not lose."""

    def __init__(self, server: HttpServer, address: str, prefill: FakePrefill, decode: FakeDecode) -> None:
        self.server = server
        self.prefill = prefill
        self.decode = decode
        host, _, port = address.rpartition(":")
        self.address = host, int(port)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)

    async def send(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Everything that comes back until the server closes the connection."""
        reader, writer = await self.open()
        try:
            writer.write(data)
            await writer.drain()
            if half_close:
                writer.write_eof()
            async with asyncio.timeout(PATIENCE):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def ask(self, data: bytes) -> bytes:
        """The one answer to one request; does not wait for the server to close the connection."""
        reader, writer = await self.open()
        try:
            writer.write(data)
            async with asyncio.timeout(PATIENCE):
                return await answer_from(reader)
        finally:
            writer.close()

    async def works(self) -> bool:
        status, body = parse(await self.ask(post(SIZED)))
        return status == 200 and body["choices"][0]["text"] == "abc"

    def held(self) -> tuple[int, int, int]:
        return len(asyncio.all_tasks()), self.server.connections, len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def leak_free_router(decode: FakeDecode | None = None) -> AsyncIterator[Router]:
    """A router that must hold, afterwards, what it held before."""
    prefill, decode = FakePrefill(), decode or FakeDecode()
    async with running_pipeline(prefill, decode) as (pipeline, _):
        server = HttpServer(build_app(pipeline.completions, pipeline.not_ready, LIMITS), "127.0.0.1:0", LIMITS)
        router = Router(server, await server.start(), prefill, decode)
        try:
            assert await router.works()
            await eventually(lambda: server.connections == 0)
            before = router.held()
            yield router
            assert await router.works()
            await decode.until_idle()
            await prefill.until_idle()
            await eventually(lambda: router.held() <= before and router.held()[1] == 0)
            assert pipeline.completions.running == 0
        finally:
            await server.stop()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  sockets close when the kernel says so
            await asyncio.sleep(0.01)


def post(head: bytes, body: bytes = BODY, *, path: bytes = b"/v1/completions", kind: bytes = JSON) -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + kind + head + b"\r\n" + body


def get(path: bytes, head: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n"


def sized(body: bytes, head: bytes = b"", **parts: bytes) -> bytes:
    return post(b"Content-Length: %d\r\n" % len(body) + head, body, **parts)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer_from(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    assert length is not None
    return head + await reader.readexactly(int(length[1]))


def parse(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


LARGE = b'{"prompt": "%b"}' % (b"a" * (64 << 10))
BAD: dict[str, tuple[bytes, int]] = {
    # Not HTTP.
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "random bytes": (bytes(range(255, 0, -1)) + b"\r\n\r\n", 400),
    "no target": (b"GET\r\n\r\n", 400),
    "no such version": (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "no such method": (b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "bare line feeds": (b"GET /v1/models HTTP/1.1\nHost: x\n\n", 400),
    "nul in the path": (get(b"/v1/\x00"), 400),
    "broken url": (get(b"http://[evil/v1/models"), 400),
    # Heads.
    "long line": (get(b"/" + b"a" * 20_000), 431),
    "long header": (post(SIZED + b"X-A: " + b"a" * 20_000 + b"\r\n"), 431),
    "many headers": (post(SIZED + b"X-A: a\r\n" * 100), 431),
    "no colon": (post(SIZED + b"nonsense\r\n"), 400),
    "space in a name": (post(SIZED + b"X Y: a\r\n"), 400),
    "nul in a value": (post(SIZED + b"X: a\x00b\r\n"), 400),
    "folded header": (post(SIZED + b"X: a\r\n b\r\n"), 400),
    "smuggled line": (post(SIZED + b"X: a\rY: b\r\n"), 400),
    # Framing.
    "length in words": (post(b"Content-Length: ten\r\n"), 400),
    "negative length": (post(b"Content-Length: -5\r\n"), 400),
    "signed length": (post(b"Content-Length: +34\r\n"), 400),
    "overflowing length": (post(b"Content-Length: " + b"9" * 30 + b"\r\n"), 400),
    "two lengths": (post(SIZED + b"Content-Length: 3\r\n"), 400),
    "length and chunks": (post(SIZED + CHUNKED), 400),
    "unknown framing": (post(b"Transfer-Encoding: gzip\r\n"), 400),
    "chunk without size": (post(CHUNKED, b"zz\r\nabc\r\n0\r\n\r\n"), 400),
    "negative chunk": (post(CHUNKED, b"-1\r\nabc\r\n0\r\n\r\n"), 400),
    "overlong chunk": (post(CHUNKED, b"1\r\nabc\r\n0\r\n\r\n"), 400),
    "broken later chunk": (post(CHUNKED, chunk(BODY[:9]) + b"??\r\n"), 400),
    # Bodies.
    "announced too large": (post(b"Content-Length: 99999999999\r\n", b""), 413),
    "chunked too large": (post(CHUNKED, chunk(LARGE[:40_000]) + chunk(LARGE[40_000:]) + chunk(b"")), 413),
    "gzip": (sized(gzip.compress(BODY), b"Content-Encoding: gzip\r\n"), 415),
    "gzip bomb": (sized(gzip.compress(bytes(8 << 20)), b"Content-Encoding: gzip\r\n"), 415),
    "gzip by transfer": (post(b"Transfer-Encoding: gzip, chunked\r\n", chunk(gzip.compress(BODY)) + chunk(b"")), 415),
    "no type": (sized(BODY, kind=b""), 415),
    "form": (sized(BODY, kind=b"Content-Type: multipart/form-data; boundary=x\r\n"), 415),
    "odd type": (sized(BODY, kind=b"Content-Type: \xff\xfe/;;;\r\n"), 415),
    "utf-16": (sized(BODY.decode().encode("utf-16")), 400),
    "latin-1": (sized(b'{"prompt": "\xe9"}'), 400),
    "deep": (sized(b'{"prompt": ' + b"[" * 20_000), 400),
    "deep messages": (sized(b'{"messages": ' + b'[{"a":' * 3_000, path=b"/v1/chat/completions"), 400),
    "empty": (sized(b""), 400),
    "cut off": (sized(BODY[:-3]), 400),
    "slow": (post(SIZED, BODY[:5]), 408),
    "slow chunks": (post(CHUNKED, chunk(BODY[:5])), 408),
    # Semantics.
    "unknown expectation": (sized(BODY, b"Expect: magic\r\n"), 417),
    "unknown expectation, unknown path": (sized(BODY, b"Expect: magic\r\n", path=b"/nope"), 417),
    "unknown path": (get(b"/v1/%zz%00/../../etc/passwd"), 404),
    "proxying": (b"CONNECT evil:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "wrong method": (get(b"/v1/chat/completions"), 405),
    "odd objective": (sized(BODY, b"x-hma-slo-ttft-ms: soon\r\n"), 400),
}


async def test_malformed_requests(caplog: pytest.LogCaptureFixture) -> None:
    """One router for all of them: whatever one leaves behind would show in those after it."""
    async with leak_free_router() as router:
        for name, (data, expected) in BAD.items():
            answer = await router.ask(data)
            assert b"Traceback" not in answer, name
            status, body = parse(answer)
            assert status == expected, (name, body)
            assert set(body["error"]) == {"message", "type", "param", "code"}, name
            assert body["error"]["message"], name
            assert b"x-request-id:" in answer.lower(), name
            assert b"aiohttp" not in answer, name
            assert await router.works(), name
        await eventually(lambda: router.server.connections == 0)
        assert len(router.decode.calls) == len(BAD) + 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 40


async def test_a_head_that_never_ends_is_given_up() -> None:
    async with leak_free_router() as router:
        assert await router.send(b"POST /v1/compl") == b""
        assert await router.send(b"") == b""
        reader, writer = await router.open()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ConnectionError):
                for byte in post(SIZED * 50):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
                    if reader.at_eof():
                        raise ConnectionResetError
        writer.close()


@pytest.mark.parametrize("data", [b"GET /v1", post(SIZED, BODY[:9]), post(CHUNKED, chunk(BODY[:9])), post(SIZED), b""])
async def test_a_half_closed_connection_is_a_client_that_left(data: bytes) -> None:
    async with leak_free_router() as router:
        router.decode.stall_after = 0
        answer = await router.send(data, half_close=True)
        assert answer == b"" or parse(answer)[0] == 400
        await router.decode.until_idle()
        router.decode.stall_after = None


async def test_a_later_request_that_is_broken_ends_only_itself() -> None:
    async with leak_free_router() as router:
        reader, writer = await router.open()
        async with asyncio.timeout(PATIENCE):
            writer.write(post(SIZED) * 2)
            assert [parse(await answer_from(reader))[0] for _ in range(2)] == [200, 200]
            writer.write(b"nonsense\r\n\r\n")
            assert parse(await reader.read())[0] == 400
        writer.close()


async def test_a_client_that_does_not_read_is_dropped() -> None:
    info = fake_worker(WorkerRole.DECODE, address="127.0.0.1:0", max_running=32)
    async with leak_free_router(FakeDecode(info)) as router:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(router.address)
        body = b'{"prompt": "abc", "max_tokens": 500, "n": 32, "logprobs": 1, "stream": true, "return_token_ids": true}'
        plain.sendall(sized(body))
        await router.decode.until_active(1)
        await eventually(lambda: router.decode.active == 0 and router.server.connections == 0)
        plain.close()


async def test_connections_are_bounded() -> None:
    async with leak_free_router() as router:
        held = [await router.open() for _ in range(LIMITS.max_connections)]
        await eventually(lambda: router.server.connections == len(held))
        reader, writer = await router.open()
        async with asyncio.timeout(PATIENCE):
            answer = await reader.read()
        writer.close()
        status, body = parse(answer)
        assert (status, body["error"]["code"]) == (503, "unavailable")
        assert b"Retry-After" in answer
        for _, one in held:
            one.close()
        await eventually(lambda: router.server.connections == 0)


async def test_a_hundred_clients_that_leave_in_mid_request_leave_nothing() -> None:
    async with leak_free_router() as router:
        router.decode.stall_after = 1
        for position in range(100):
            _, writer = await router.open()
            writer.write(post(SIZED)[: 40 + position * 2])
            await writer.drain()
            if position % 2:
                writer.transport.abort()
            else:
                writer.close()
            await eventually(lambda: router.server.connections <= 2)
        await eventually(lambda: router.server.connections == 0)
        router.decode.stall_after = None
