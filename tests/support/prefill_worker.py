"""A real prefill worker for tests, and the calls that a router would make."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2

from hma_serve.rpc import from_rpc_error
from hma_serve.v1 import common_pb2, kv_block_pb2, prefill_pb2, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc
from support.cluster import descendants
from support.deadlines import deadline_in
from support.push_receiver import PushReceiver

LAYERS, VOCAB, WINDOW, CHUNK = 6, 320, 2048, 64
MAX_RUNNING, MAX_WAITING = 3, 1
START_SECONDS = 60.0
LAYER_BYTES = 2 * 2 * (CHUNK // 32) * 1088
_SERVING = re.compile(r"gRPC (\S+), HTTP (\S+)$")


@dataclass
class Worker:
    """A running `hma-serve prefill`."""

    process: subprocess.Popen[str]
    events: Path
    lines: list[str] = field(default_factory=list)
    address: str = ""
    http: str = ""

    def wait_serving(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := _SERVING.search(line.rstrip()):
                self.address, self.http = found.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self._drainer = threading.Thread(target=self.lines.extend, args=(self.process.stderr,), daemon=True)
        self._drainer.start()

    @property
    def engine_pid(self) -> int:
        (pid,) = descendants(self.process.pid)
        return pid

    def recorded(self, request_id: str) -> list[dict[str, int]]:
        events = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [event for event in events if event["request"] == request_id]


@contextlib.contextmanager
def running_worker(checkpoint: Path, events: Path, *arguments: str) -> Iterator[Worker]:
    command = [sys.executable, "-m", "hma_serve.cli.main", "prefill", "--model", str(checkpoint), "--etcd", "none"]
    command += ["--listen", "127.0.0.1:0", "--threads", "1", "--events", str(events), "--max-running", str(MAX_RUNNING)]
    command += [
        "--max-waiting",
        str(MAX_WAITING),
        "--chunk-tokens",
        str(CHUNK),
        "--prefix-cache-bytes",
        "0",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    worker = Worker(process, events)
    try:
        worker.wait_serving()
        watchdog.cancel()
        yield worker
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        assert process.stderr is not None
        worker._drainer.join(5)
        process.stderr.close()


@contextlib.asynccontextmanager
async def connected(worker: Worker) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        yield Client(channel)


def prompt(tokens: int, seed: int = 5) -> list[int]:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


_names = itertools.count()


class Call:
    """One Prefill call."""

    def __init__(self, channel: grpc.aio.Channel, request: prefill_pb2.PrefillRequest) -> None:
        self.request = request
        self.call = prefill_pb2_grpc.PrefillStub(channel).Prefill(request, timeout=60)
        self.responses: list[prefill_pb2.PrefillResponse] = []

    async def read(self) -> prefill_pb2.PrefillResponse | None:
        """The next response, None at the end; typed errors."""
        try:
            response = await self.call.read()
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from None
        if not isinstance(response, prefill_pb2.PrefillResponse):
            return None
        self.responses.append(response)
        return response

    async def accepted(self) -> prefill_pb2.PrefillAccepted:
        response = await self.read()
        assert response is not None
        assert response.HasField("accepted")
        return response.accepted

    async def completed(self) -> prefill_pb2.PrefillCompleted:
        while await self.read() is not None:
            pass
        return self.responses[-1].completed


class Client:
    """A router's view of the worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._worker = worker_pb2_grpc.WorkerStub(channel)

    def prefill(
        self,
        receiver: PushReceiver | str,
        token_ids: list[int],
        *,
        token_start: int = 0,
        ticket: bytes = b"",
        address: str = "",
        epoch: int = 1,
        deadline: float = 60.0,
        tenant: str = "",
        agreement: kv_block_pb2.KvAgreement | None = None,
    ) -> Call:
        name = f"request-{next(_names)}"
        context = common_pb2.RequestContext(request_id=name, epoch=epoch, deadline=deadline_in(deadline), tenant=tenant)
        request = prefill_pb2.PrefillRequest(
            context=context,
            token_ids=token_ids,
            ticket=ticket or name.encode().ljust(16, b"."),
            decode_address=address or (receiver if isinstance(receiver, str) else receiver.address),
            token_start=token_start,
            agreement=agreement,
        )
        return Call(self._channel, request)

    async def describe(self) -> worker_pb2.WorkerInfo:
        return (await self._worker.Describe(worker_pb2.DescribeRequest())).worker

    async def drain(self, grace: float) -> worker_pb2.DrainResponse:
        request = worker_pb2.DrainRequest()
        request.grace.FromMilliseconds(int(grace * 1000))
        return await self._worker.Drain(request)

    async def health(self) -> int:
        check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return int((await check(health_pb2.HealthCheckRequest(service="hma_serve.v1.Prefill"))).status)

    async def loads(self) -> AsyncGenerator[worker_pb2.WorkerLoad, None]:
        call = self._worker.WatchLoad(worker_pb2.WatchLoadRequest())
        try:
            async for response in call:
                yield response.load
        finally:
            call.cancel()

    async def wait_load(self, *, running: int, waiting: int = 0) -> worker_pb2.WorkerLoad:
        async with asyncio.timeout(20), contextlib.aclosing(self.loads()) as loads:
            async for load in loads:
                if (load.running, load.waiting) == (running, waiting):
                    return load
        raise AssertionError("the stream of loads ended")

    async def idle(self) -> None:
        """Every request's share of the load is back."""
        assert (await self.wait_load(running=0)).queued_tokens == 0
