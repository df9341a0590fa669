"""How fast KV gets into one decode worker through its receivers, and what that costs the requests that it decodes.

A batch decodes all the time; its tokens are timed where a router would get them, so that whatever delays one counts.
Beside it one producer for each receiver, a process of the lowest priority, fills tickets again and again that it never
commits, first as fast as it is taken. Where that costs too much, the rate is halved towards what does not. Each rate
is measured in turn with nothing arriving, a few times, since machines have moods, and either first by turns, since the
batch's contexts grow; medians are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import grpc.aio
import numpy as np

from bench.kv_producer import CALL_SECONDS, Producer
from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.rpc import open_channel, tune_allocator
from hma_serve.v1 import decode_pb2, decode_pb2_grpc

ALLOWED = 1.05
"""Of the p99 of a token without KV arriving."""

STREAMS = 2
"""At a time for each receiver, as one waits for the engine between two prompts."""

_HALVINGS = 4
_TURNS = 4
_POLL_SECONDS = 0.02
_PHASE_SECONDS = 120.0


@dataclass(frozen=True)
class Load:
    """What decodes meanwhile, and what arrives.

    Attributes:
        model: Name, directory or `random:SHAPE`.
        codec: Of the KV.
        batch: Requests that decode.
        context: Tokens of their prompts, all packed.
        steps: Tokens of each that are timed at a time.
        window: Tokens of a request at most.
        pushed: Tokens of the prompts that arrive.
    """

    model: str
    codec: str
    batch: int
    context: int
    steps: int
    window: int
    pushed: int

    def producer(self, tokens: int) -> Producer:
        """Of this model's KV, for prompts of so many tokens; BLOCKING."""
        checkpoint = resolve_checkpoint(self.model)
        return Producer(read_model_config(checkpoint), fingerprint(checkpoint), self.codec, tokens)


@dataclass(frozen=True)
class Point:
    """One rate.

    Attributes:
        rate: Payload bytes per second that arrived.
        alone: p99 of a token without producers, seconds.
        beside: p99 with them.
    """

    rate: float
    alone: float
    beside: float

    @property
    def rise(self) -> float:
        """With producers over without."""
        return self.beside / self.alone


@dataclass(frozen=True)
class Ingest:
    """One number of receivers.

    Attributes:
        receivers: How many were used.
        points: Full rate first.
    """

    receivers: int
    points: Sequence[Point] = field(default_factory=list)

    @property
    def best(self) -> Point | None:
        """The fastest that costs no more than is allowed."""
        return max(
            (point for point in self.points if point.rise <= ALLOWED), key=lambda point: point.rate, default=None
        )


def produce(load: Load, decode: str, receiver: str) -> None:
    """Main of a producer: reads a rate (0: any) and pushes until the next line, then prints its bytes per second."""
    os.nice(19)
    tune_allocator()
    asyncio.run(_produce(load.producer(load.pushed), decode, receiver))


async def _produce(producer: Producer, decode: str, receiver: str) -> None:
    loop = asyncio.get_running_loop()
    async with open_channel(decode) as front, open_channel(receiver) as channel:
        held = [await producer.ticket(front, receiver) for _ in range(STREAMS)]
        await asyncio.gather(*(producer.fill(channel, ticket) for _, ticket in held))
        print("ready", flush=True)
        while rate := await loop.run_in_executor(None, sys.stdin.readline):
            stop = loop.run_in_executor(None, sys.stdin.readline)
            began, each = time.perf_counter(), float(rate) / STREAMS

            async def keep_filling(ticket: decode_pb2.Ticket, each: float = each, stop: Any = stop) -> int:
                sent = 0
                while not stop.done():
                    sent += await producer.fill(channel, ticket, rate=each, stopped=stop.done)
                return sent

            sent = await asyncio.gather(*(keep_filling(ticket) for _, ticket in held))
            print(sum(sent) / (time.perf_counter() - began), flush=True)
        for call, _ in held:
            call.cancel()


class _Producers:
    """The processes, of which the first few push when they are told to."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def say(self, count: int, line: str) -> None:
        for process in self._processes[:count]:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def hear(self, count: int) -> list[str]:
        heard = []
        for process in self._processes[:count]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a producer of KV ended; its traceback is above")
            heard.append(line.strip())
        return heard


@contextlib.contextmanager
def _producers(load: Load, decode: str, receivers: Sequence[str]) -> Iterator[_Producers]:
    processes: list[subprocess.Popen[str]] = []
    try:
        for receiver in receivers:
            code = f"from bench.ingest import Load, produce; produce({load!r}, {decode!r}, {receiver!r})"
            command = [sys.executable, "-c", code]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        yield _Producers(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class _Batch:
    """Requests that decode until they are told to end, each followed by another; `async with`.

    What came is kept as moments and tokens; the first of a request counts for none, as nothing goes before it.
    """

    def __init__(self, load: Load, producer: Producer, decode: str, new_tokens: int) -> None:
        self._load, self._producer = load, producer
        self._decode, self._new_tokens = decode, new_tokens
        self._came: list[list[tuple[float, int]]] = [[] for _ in range(load.batch)]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(self._load.batch)]
        try:
            await self._until(lambda: all(len(came) > 8 for came in self._came))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def p99(self) -> float:
        """Of the seconds from a token to the next, over all requests, from now on for so many steps."""
        begins = [len(came) for came in self._came]

        def enough() -> bool:
            pairs = zip(self._came, begins, strict=True)
            return all(sum(count for _, count in came[begin:]) > self._load.steps for came, begin in pairs)

        await self._until(enough)
        gaps: list[float] = []
        for came, begin in zip(self._came, begins, strict=True):
            # A request that follows another begins with a token that counts for none.
            for (before, _), (after, count) in pairwise(came[begin:]):
                if count:
                    gaps += [(after - before) / count] * count
        return float(np.quantile(gaps, 0.99))

    async def _stream(self, number: int) -> None:
        async with open_channel(self._decode) as channel:
            stub: Any = decode_pb2_grpc.DecodeStub(channel)
            while True:
                request = self._producer.request(self._new_tokens, f"batch {number} {time.monotonic_ns()}")
                call = stub.Generate(request, timeout=CALL_SECONDS)
                ticket = (await call.read()).ticket
                async with open_channel(ticket.push_address) as receiver:
                    await self._producer.fill(receiver, ticket, commit=True)
                begun = False
                while (response := await call.read()) is not grpc.aio.EOF:
                    if count := len(response.tokens.token_ids):
                        self._came[number].append((time.perf_counter(), count if begun else 0))
                        begun = True

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(_PHASE_SECONDS):
            while not reached():
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(_POLL_SECONDS)


async def measure(load: Load, decode: str, counts: Sequence[int], seconds: float) -> AsyncIterator[Ingest]:
    """Yields a result for each number of receivers, the worker's first ones.

    Args:
        load: What decodes and what arrives.
        decode: Address of a decode worker that has as many receivers, or the one process that does all (a count of 1).
        counts: Of receivers.
        seconds: Begin no new measurement after so many.
    """
    end = time.monotonic() + seconds
    producer = await asyncio.to_thread(load.producer, load.context)
    receivers = await _receivers(producer, decode)
    if max(counts) > len(receivers):
        raise RuntimeError(f"the decode worker has {len(receivers)} receivers, not {max(counts)}")
    tokens = min(load.window - load.context - 32, 4 * _TURNS * (_HALVINGS + 1) * load.steps + 256)
    with _producers(load, decode, receivers[: max(counts)]) as producers:
        await asyncio.to_thread(producers.hear, max(counts))
        for count in counts:
            points: list[Point] = []
            async with _Batch(load, producer, decode, tokens) as batch:
                while time.monotonic() < end and (rate := _next_rate(points)) is not None:
                    points.append(await _point(batch, producers, count, rate))
            if points:
                yield Ingest(count, points)


def _next_rate(points: Sequence[Point]) -> float | None:
    """0 for as fast as it goes, then by halving between what costs too much and what does not; None: enough."""
    if not points:
        return 0.0
    if points[0].rise <= ALLOWED or len(points) > _HALVINGS:
        return None
    dear = min(point.rate for point in points if point.rise > ALLOWED)
    cheap = max((point.rate for point in points if point.rise <= ALLOWED), default=0.0)
    return (dear + cheap) / 2


async def _point(batch: _Batch, producers: _Producers, count: int, rate: float) -> Point:
    arrived, alone, beside = [], [], []
    for turn in range(_TURNS):
        if turn % 2 == 0:
            alone.append(await batch.p99())
        producers.say(count, str(rate / count))
        await asyncio.sleep(0.2)
        beside.append(await batch.p99())
        producers.say(count, "")
        arrived.append(sum(map(float, await asyncio.to_thread(producers.hear, count))))
        if turn % 2 == 1:
            alone.append(await batch.p99())
    return Point(*(statistics.median(each) for each in (arrived, alone, beside)))


async def _receivers(producer: Producer, decode: str) -> list[str]:
    """Addresses that tickets name in turn, until one comes again."""
    found: list[str] = []
    async with open_channel(decode) as channel:
        while True:
            call, ticket = await producer.ticket(channel)
            call.cancel()
            if ticket.push_address in found:
                return found
            found.append(ticket.push_address)
