"""A client that goes away takes its work with it: one layer more in prefill, one step more in decode, no page held.

One real cluster. An engine that is stopped (SIGSTOP) is certainly in the middle of a request, so the moment of the
disconnect needs no luck and what the engine did afterwards can be counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import httpx
import pytest

from hma_serve.client import AsyncClient, Client, HmaError
from hma_serve.v1 import inference_pb2, inference_pb2_grpc
from support.cluster import Cluster, running_cluster
from support.metrics import metric_in

LONG = 3500
SHORT = [7] * 20
"""Too short for prefill: decode computes it."""
CHUNK = 64
LAYERS = 8
NEW_TOKENS = 500
PATIENCE = 30.0
"""Seconds until a condition that must come true is given up."""

_numbers = itertools.count()


def fresh(length: int = LONG) -> list[int]:
    """A prompt whose beginning no cache knows."""
    number = next(_numbers)
    return [5 + number // 900, 5 + number % 900, *(5 + index % 900 for index in range(length - 2))]


Value = TypeVar("Value")
ClientKind = Callable[["Bench", list[int]], AsyncGenerator[None, None]]


@dataclass(frozen=True)
class Gauges:
    """What the services hold for requests."""

    router_running: float
    router_waiting: float
    prefill_running: float
    prefill_waiting: float
    prefill_queued_tokens: float
    decode_running: float
    decode_waiting: float
    decode_kv_used_tokens: float


IDLE = Gauges(0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Bench:
    """The cluster and what the tests look at."""

    cluster: Cluster
    events: Path
    http: httpx.AsyncClient

    async def value(self, role: str, name: str) -> float:
        """As `Cluster.metric`."""
        return metric_in((await self.http.get(self.cluster.metrics_url(role))).text, f"hma_{role}_{name}")

    async def gauges(self) -> Gauges:
        return Gauges(
            await self.value("router", "running_requests"),
            await self.value("router", "waiting_requests"),
            await self.value("prefill", "running_requests"),
            await self.value("prefill", "waiting_requests"),
            await self.value("prefill", "queued_tokens"),
            await self.value("decode", "running_requests"),
            await self.value("decode", "waiting_requests"),
            await self.value("decode", "kv_used_tokens"),
        )

    async def idle(self) -> None:
        """Waits until no service holds anything for a request."""
        await eventually(self.gauges, lambda gauges: gauges == IDLE)

    async def ended(self, role: str) -> float:
        """Requests that are over, however they ended."""
        return await self.value(role, "requests_total")

    async def cancelled(self, role: str) -> float:
        return await self.value(role, 'requests_total{outcome="cancelled"}')

    async def mid_prefill(self) -> None:
        """Waits until some layers of a request have left."""
        recorded = self.layers()
        await eventually(self._layers, lambda layers: layers >= recorded + 2 * LAYERS)
        assert (await self.gauges()).prefill_queued_tokens > 0

    async def _layers(self) -> int:
        return self.layers()

    def layers(self) -> int:
        """Layers of all requests that were computed and sent."""
        return self.events.read_text().count("\n")

    def engine(self, role: str) -> int:
        """The pid of a worker's engine."""
        (pid,) = [pid for pid in self.cluster.children() if f"hma_serve.{role}.engine_main" in arguments(pid)]
        return pid

    @contextlib.asynccontextmanager
    async def stopped(self, role: str) -> AsyncIterator[None]:
        """Holds an engine; what it said before has been read by its front on entry."""
        pid = self.engine(role)
        os.kill(pid, signal.SIGSTOP)
        try:
            await eventually(lambda: asyncio.to_thread(state, pid), lambda now: now == "T")
            # Answered by the front's event loop, which takes the engine's last words in between.
            for _ in range(3):
                await self.gauges()
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    async def works(self) -> None:
        """A request through both workers, whole."""
        body = {"prompt": fresh(200), "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        response = await self.http.post(f"{self.cluster.url}/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 3


def arguments(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def eventually(read: Callable[[], Awaitable[Value]], good: Callable[[Value], bool]) -> Value:
    """Reads until the value is good; fails with the last one."""
    end = time.monotonic() + PATIENCE
    while not good(value := await read()):
        assert time.monotonic() < end, f"still {value}"
        await asyncio.sleep(0.01)
    return value


# Clients: each yields once per token or event, and goes away when it is cancelled.


async def http_stream(bench: Bench, prompt: list[int]) -> AsyncGenerator[None, None]:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True}
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{bench.cluster.url}/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            for _ in token_ids(line):
                yield


async def http_whole(bench: Bench, prompt: list[int]) -> AsyncGenerator[None, None]:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as client:
        await client.post(f"{bench.cluster.url}/v1/completions", json=body)
    yield


async def grpc_call(bench: Bench, prompt: list[int]) -> AsyncGenerator[None, None]:
    request = inference_pb2.GenerateRequest()
    request.token_ids.ids.extend(prompt)
    request.stop.max_tokens, request.stop.ignore_eos = NEW_TOKENS, True
    async with grpc.aio.insecure_channel(bench.cluster.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)
        try:
            async for event in call:
                for _ in event.delta.token_ids:
                    yield
        finally:
            call.cancel()


async def sdk_async(bench: Bench, prompt: list[int]) -> AsyncGenerator[None, None]:
    async with AsyncClient(bench.cluster.grpc_address) as client:
        stream = client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
        try:
            async for delta in stream:
                for _ in delta.token_ids:
                    yield
        finally:
            stream.cancel()


async def sdk_blocking(bench: Bench, prompt: list[int]) -> AsyncGenerator[None, None]:
    with Client(bench.cluster.grpc_address) as client:
        stream = client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
        reader = iter(stream)
        reading: asyncio.Task[Any] | None = None
        try:
            while True:
                reading = asyncio.create_task(asyncio.to_thread(next, reader, None))
                delta = await asyncio.shield(reading)
                if delta is None:
                    return
                for _ in delta.token_ids:
                    yield
        finally:
            stream.cancel()
            if reading is not None:
                with contextlib.suppress(HmaError):
                    await reading


STREAMING = [http_stream, grpc_call, sdk_async, sdk_blocking]
CLIENTS = [*STREAMING, http_whole]


def token_ids(line: str) -> list[int]:
    """The token ids of one line of server-sent events."""
    if not line.startswith("data: {"):
        return []
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return [token for choice in choices for token in choice.get("token_ids") or ()]


class Reading:
    """A client at work; `leave` disconnects it."""

    def __init__(self, bench: Bench, client: ClientKind, prompt: list[int]) -> None:
        self.tokens = 0
        self._task = asyncio.create_task(self._read(client(bench, prompt)))

    async def _read(self, stream: AsyncGenerator[None, None]) -> None:
        async with contextlib.aclosing(stream):
            async for _ in stream:
                self.tokens += 1

    async def has(self, tokens: int) -> None:
        async def count() -> int:
            assert not self._task.done(), "the answer ended too early"
            return self.tokens

        await eventually(count, lambda count: count >= tokens)

    async def leave(self) -> None:
        assert not self._task.done(), "the answer ended before the client could leave"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cancellation")
    events = f"--prefill-arg=--events={directory / 'events.jsonl'}"
    with running_cluster(directory, f"--prefill-arg=--chunk-tokens={CHUNK}", events) as cluster:
        yield cluster


@pytest.fixture
async def bench(cluster: Cluster) -> AsyncIterator[Bench]:
    """Idle before and after each test, and still serving."""
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        bench = Bench(cluster, cluster.directory / "events.jsonl", http)
        await bench.works()
        await bench.idle()
        yield bench
        await bench.idle()
        await bench.works()


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_leaves_in_mid_prefill_costs_one_layer(bench: Bench, client: ClientKind) -> None:
    ended = await bench.ended("prefill")
    discarded = await bench.value("prefill", "discarded_layers_total")
    reading = Reading(bench, client, fresh())
    await bench.mid_prefill()
    async with bench.stopped("prefill"):
        assert (await bench.gauges()).decode_kv_used_tokens > LONG // 8
        await reading.leave()
        # All is free again although the engine has not even heard of it.
        await bench.idle()
        # Whether prefill hears of the router's cancellation first or of decode's that follows it is a race.
        await eventually(lambda: bench.ended("prefill"), lambda count: count > ended)
        sent = bench.layers()
    await bench.works()
    # The engine answers in order, so whatever it did for the request that left has been seen by now.
    assert await bench.value("prefill", "discarded_layers_total") - discarded <= 1
    assert bench.layers() - sent == 3 * LAYERS  # of the request that just worked: 192 packed tokens
    assert reading.tokens == 0


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_leaves_before_prefill_begins_sends_no_layer(bench: Bench, client: ClientKind) -> None:
    sent = bench.layers()
    discarded = await bench.value("prefill", "discarded_layers_total")
    async with bench.stopped("prefill"):
        reading = Reading(bench, client, fresh())
        await eventually(bench.gauges, lambda gauges: gauges.prefill_queued_tokens > 0)
        await reading.leave()
        await bench.idle()
    await bench.works()
    assert await bench.value("prefill", "discarded_layers_total") - discarded <= 1
    assert bench.layers() - sent == 3 * LAYERS


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_leaves_before_the_first_token_costs_one_step(bench: Bench, client: ClientKind) -> None:
    steps = await bench.value("decode", "steps_total")
    cancelled = await bench.cancelled("decode")
    async with bench.stopped("decode"):
        reading = Reading(bench, client, SHORT)
        await eventually(bench.gauges, lambda gauges: gauges.router_running == 1)
        # The router calls decode in the same turn; a round of scrapes later decode has the call.
        await bench.gauges()
        await reading.leave()
        await eventually(lambda: bench.cancelled("decode"), lambda count: count == cancelled + 1)
    await bench.idle()
    assert await bench.value("decode", "steps_total") - steps <= 1
    assert reading.tokens == 0


@pytest.mark.parametrize("client", STREAMING)
async def test_a_client_that_leaves_in_mid_stream_costs_one_step(bench: Bench, client: ClientKind) -> None:
    steps = await bench.value("decode", "steps_total")
    tokens = await bench.value("decode", "tokens_total")
    cancelled = await bench.cancelled("decode")
    reading = Reading(bench, client, SHORT)
    await reading.has(5)
    async with bench.stopped("decode"):

        async def relayed() -> float:
            return await bench.value("decode", "tokens_total") - tokens - reading.tokens

        await eventually(relayed, lambda missing: missing == 0)
        assert (await bench.gauges()).decode_running == 1
        await reading.leave()
        await eventually(lambda: bench.cancelled("decode"), lambda count: count == cancelled + 1)
    await bench.idle()
    # One step computes the prompt and gives the first token, each further one gives one.
    assert 0 <= await bench.value("decode", "steps_total") - steps - reading.tokens <= 1


async def test_forty_mixed_aborts_at_once_leave_nothing_behind(bench: Bench) -> None:
    draw = random.Random(3)
    await storm(bench, draw, 10)
    await bench.idle()
    files = {pid: open_files(pid) for pid in bench.cluster.children()}
    await storm(bench, draw, 40)
    await bench.idle()

    async def left_over() -> dict[int, int]:
        more = {pid: open_files(pid) - before for pid, before in files.items()}
        return {pid: count for pid, count in more.items() if count > 2}

    # Sockets of clients and of streams are closed; the margin is for the tests' own scrapes.
    await eventually(left_over, lambda more: not more)
    assert set(bench.cluster.children()) == set(files)


async def storm(bench: Bench, draw: random.Random, count: int) -> None:
    """So many clients at once, of all kinds, that leave at random moments."""

    async def one(client: ClientKind) -> None:
        prompt = draw.choice([SHORT, fresh(), fresh(300), fresh(1000)])
        patience = draw.uniform(0, 1.5)
        reading = Reading(bench, client, prompt)
        await asyncio.sleep(patience)
        await reading.leave()

    await asyncio.gather(*(one(CLIENTS[index % len(CLIENTS)]) for index in range(count)))
