"""The router as a process: real sockets, real signals, a real registry; only the workers are fakes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hma_serve.core.worker import WorkerInfo
from hma_serve.registry import Session, Watcher, open_store
from hma_serve.v1 import inference_pb2, inference_pb2_grpc
from support.etcd_server import EtcdServer
from support.fake_workers import FakeDecode, FakePrefill, FakeWorker, running, write_fake_checkpoint
from support.worker_records import wait_fleet

START = 30.0
PROMPT = "It was a dark and stormy night, and the rain fell in torrents."


class Router:
    """A router process."""

    def __init__(self, process: asyncio.subprocess.Process, http: str, grpc_address: str, log: list[str]) -> None:
        self.process = process
        self.url = f"http://{http}"
        self.grpc_address = grpc_address
        self.log = log

    async def ready(self, client: httpx.AsyncClient) -> None:
        async with asyncio.timeout(START):
            while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START):
            return await self.process.wait()


async def start(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hma_serve.router.main", *flags, stderr=asyncio.subprocess.PIPE, env=os.environ
    )


@asynccontextmanager
async def router(model: Path, registry: str, *flags: str) -> AsyncIterator[Router]:
    listen = ("--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0")
    process = await start("--model", str(model), "--etcd", registry, *listen, *flags)
    assert process.stderr is not None
    log: list[str] = []
    addresses = None
    async with asyncio.timeout(START):
        while addresses is None:
            line = (await process.stderr.readline()).decode()
            assert line, "".join(log)
            log.append(line)
            addresses = re.search(r"serving fake http=(\S+) grpc=(\S+)", line)
    reader = asyncio.create_task(_read(process.stderr, log))
    try:
        yield Router(process, addresses[1], addresses[2], log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reader


async def _read(stream: asyncio.StreamReader, log: list[str]) -> None:
    async for line in stream:
        log.append(line.decode())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fake_checkpoint(tmp_path / "fake")


def write_fleet(path: Path, *workers: FakeWorker) -> str:
    path.write_text(json.dumps([MessageToDict(worker.info.to_proto()) for worker in workers]))
    return f"file:{path}"


async def test_a_static_fleet_is_served_over_http_and_grpc(model: Path, tmp_path: Path) -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with running(prefill, decode):
        registry = write_fleet(tmp_path / "workers.json", prefill, decode)
        async with router(model, registry) as process, httpx.AsyncClient(base_url=process.url) as client:
            await process.ready(client)
            answer = (await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20})).json()
            assert answer["choices"][0]["text"] == PROMPT[:20]
            async with grpc.aio.insecure_channel(process.grpc_address) as channel:
                request = inference_pb2.GenerateRequest(text=PROMPT)
                request.stop.max_tokens = 20
                stub = inference_pb2_grpc.InferenceStub(channel)
                text = "".join([event.delta.text async for event in stub.Generate(request)])
                assert text == PROMPT[:20]
                health: Any = health_pb2_grpc.HealthStub(channel)
                asked = health_pb2.HealthCheckRequest(service="hma_serve.v1.Inference")
                status = (await health.Check(asked)).status
                assert status == health_pb2.HealthCheckResponse.SERVING
            metrics = (await client.get("/metrics")).text
            assert 'hma_router_requests_total{outcome="ok"} 2.0' in metrics
            assert 'hma_router_workers{role="decode",state="open"} 1.0' in metrics
            assert "vllm:num_requests_running 0.0" in metrics
            assert await process.stop() == 0
    assert "Traceback" not in "".join(process.log)


async def test_workers_come_and_go_through_etcd(model: Path, tmp_path: Path) -> None:
    prefill, decode, second = FakePrefill(), FakeDecode(), FakeDecode()
    with EtcdServer(tmp_path / "etcd") as etcd:
        store = open_store(etcd.url)
        async with running(prefill, decode, second), AsyncExitStack() as sessions:

            async def register(info: WorkerInfo) -> Session:
                session = await sessions.enter_async_context(Session(store, info))
                assert await session.published(START)
                return session

            async with router(model, etcd.url) as process, httpx.AsyncClient(base_url=process.url) as client:
                body = {"prompt": PROMPT, "max_tokens": 4}
                assert (await client.get("/ready")).status_code == 503
                refused = await client.post("/v1/completions", json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
                assert "Retry-After" in refused.headers

                first = await register(decode.info)
                await register(prefill.info)
                await process.ready(client)
                assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == PROMPT[:4]
                assert len(prefill.calls) == len(decode.calls) == 1

                await register(second.info)
                first.update(replace(first.info, state=decode.info.state.DRAINING))
                assert await first.published(START)
                await first.aclose()
                async with asyncio.timeout(START):
                    while not second.calls:
                        response = await client.post("/v1/completions", json=body)
                        assert response.status_code == 200

                # Without the registry, routing goes on from the last known fleet.
                await asyncio.to_thread(etcd.kill)
                assert (await client.post("/v1/completions", json=body)).status_code == 200
                assert await process.stop() == 0
        store.close()


async def test_a_router_registers_itself_and_leaves_when_it_stops(model: Path, tmp_path: Path) -> None:
    decode = FakeDecode()
    with EtcdServer(tmp_path / "etcd") as etcd:
        store = open_store(etcd.url)
        async with running(decode), Session(store, decode.info), router(model, etcd.url) as process:
            with Watcher(store) as watcher:
                there = await asyncio.to_thread(wait_fleet, watcher, lambda fleet: len(fleet.routers) == 1)
                assert list(there.workers.values()) == [replace(decode.info, epoch=1)]
                (record,) = there.routers.values()
                assert (record.address, f"http://{record.http_address}") == (process.grpc_address, process.url)
                async with httpx.AsyncClient(base_url=process.url) as client:
                    await process.ready(client)
                    answer = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
                    assert answer.status_code == 200
                assert await process.stop() == 0
                await asyncio.to_thread(wait_fleet, watcher, lambda fleet: not fleet.routers)
        store.close()


async def test_running_requests_are_finished_before_the_router_goes(model: Path, tmp_path: Path) -> None:
    decode = FakeDecode()
    decode.gate.clear()
    async with running(decode):
        registry = write_fleet(tmp_path / "workers.json", decode)
        async with router(model, registry, "--drain-grace", "20") as process:
            async with httpx.AsyncClient(base_url=process.url, timeout=START) as client:
                call = asyncio.create_task(client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}))
                await decode.until_active()
                process.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(START):
                    while "shutting down" not in (ready := await client.get("/ready")).text:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                assert ready.status_code == 503
                assert (await client.get("/live")).status_code == 200
                late = await client.post("/v1/completions", json={"prompt": "abc"})
                assert late.status_code == 503
                decode.gate.set()
                assert (await call).json()["choices"][0]["text"] == "abc"
            async with asyncio.timeout(START):
                assert await process.process.wait() == 0


async def test_the_log_is_structured_on_request(model: Path, tmp_path: Path) -> None:
    registry = write_fleet(tmp_path / "workers.json")
    listen = ("--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0")
    process = await start("--model", str(model), "--etcd", registry, *listen, "--log-format", "json")
    assert process.stderr is not None
    entries: list[dict[str, Any]] = []
    async with asyncio.timeout(START):
        while not entries or not entries[-1]["message"].startswith("serving"):
            entries.append(json.loads(await process.stderr.readline()))
        process.send_signal(signal.SIGTERM)
        entries += map(json.loads, (await process.stderr.read()).splitlines())
        assert await process.wait() == 0
    assert all({"time", "level", "role", "logger", "message"} <= entry.keys() for entry in entries)
    assert {entry["role"] for entry in entries} == {"router"}
    assert any("http" in entry and "grpc" in entry for entry in entries)


async def test_what_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    registry = write_fleet(tmp_path / "workers.json")
    free = "127.0.0.1:0"
    for flags, expected in [
        (("--model", str(tmp_path / "nowhere"), "--etcd", registry), "nowhere"),
        (("--model", str(model), "--etcd", "ftp://x"), "--etcd"),
        (("--model", str(model)), "--etcd"),
        (("--model", str(model), "--etcd", registry, "--http-listen", "nonsense"), "--http-listen"),
        (("--model", str(model), "--etcd", registry, "--max-waiting", "0"), "--max-waiting"),
        (("--model", str(model), "--etcd", registry, "--http-listen", f"127.0.0.1:{port}"), f"127.0.0.1:{port}"),
        (
            ("--model", str(model), "--etcd", registry, "--http-listen", free, "--grpc-listen", f"127.0.0.1:{port}"),
            f"127.0.0.1:{port}",
        ),
    ]:
        process = await start(*flags)
        async with asyncio.timeout(START):
            _, log = await process.communicate()
        assert process.returncode == 1, log
        assert expected in log.decode().splitlines()[-1]
        assert b"Traceback" not in log
    taken.close()
    await taken.wait_closed()
