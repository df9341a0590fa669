"""How much a decode step suffers while another request's KV arrives at full speed, between real processes.

One stream decodes all the time; its steps are timed by its client, from one token's arrival to the next, so that
whatever delays a token counts. A producer beside it pushes KV as fast as the worker takes it, in turns with silence.
The producer has the lowest priority: in a fleet it has a machine of its own, and its cycles are not what is measured.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import Figure, figure, ratios
from bench.kv_producer import CALL_SECONDS, Producer, request
from bench.split_pair import worker
from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.rpc import open_channel, tune_allocator
from hma_serve.v1 import decode_pb2_grpc

STEPS = 400
ROUNDS = 5
PACKED_TOKENS = 2048
CODEC = "bf16"


def produce(address: str, model: str) -> None:
    """Main of the child: pushes from each line on standard input to the next, and prints its bytes per second."""
    os.nice(19)
    tune_allocator()
    asyncio.run(_produce(address, model))


async def _produce(address: str, model: str) -> None:
    loop = asyncio.get_running_loop()
    channel = open_channel(address)
    producer = Producer(read_model_config(resolve_checkpoint("demo")), model, CODEC, PACKED_TOKENS)
    while await loop.run_in_executor(None, sys.stdin.readline):
        stop = loop.run_in_executor(None, sys.stdin.readline)
        start, sent = time.perf_counter(), 0
        while not stop.done():
            # None is ever committed, so that none joins the batch.
            call, ticket = await producer.ticket(channel)
            sent += await producer.fill(channel, ticket)
            call.cancel()
        print(sent / (time.perf_counter() - start), flush=True)


async def gaps(tokens: AsyncIterator[float]) -> list[float]:
    """Seconds between so many tokens."""
    moments = [await anext(tokens) for _ in range(STEPS + 1)]
    return [after - before for before, after in pairwise(moments)]


async def arrivals(address: str) -> AsyncIterator[float]:
    """When each token of an endless greedy stream came; a new one begins when the context is full."""
    async with open_channel(address) as channel:
        stub: Any = decode_pb2_grpc.DecodeStub(channel)
        while True:
            call = stub.Generate(request([3] * 64, 3 * STEPS), timeout=CALL_SECONDS)
            begun = 0
            async for response in call:
                if response.tokens.token_ids:
                    begun += 1
                    if begun > STEPS // 4:  # past the first, whose gap holds the start
                        yield time.perf_counter()


async def measure(address: str, producer: subprocess.Popen[str]) -> list[Figure]:
    """p99 of the steps with and without KV arriving, in turns."""
    quiet: list[float] = []
    busy: list[float] = []
    rates: list[float] = []
    medians: list[float] = []
    assert producer.stdin is not None
    assert producer.stdout is not None
    for round_ in range(ROUNDS + 1):
        alone = await gaps(arrivals(address))
        _line(producer)
        beside = await gaps(arrivals(address))
        _line(producer)
        rate = float(await asyncio.to_thread(producer.stdout.readline))
        if round_:
            quiet.append(1e3 * float(np.quantile(alone, 0.99)))
            busy.append(1e3 * float(np.quantile(beside, 0.99)))
            medians.append(float(np.median(beside) / np.median(alone)))
            rates.append(rate / 1e6)
    return [
        figure("p99 of a step alone", quiet, "ms"),
        figure("p99 of a step while KV arrives", busy, "ms"),
        figure("KV that arrives meanwhile", rates, "MB/s"),
        figure("median of a step, with / without", medians, "x"),
        figure("p99 of a step, with / without", ratios(busy, quiet), "x", "at most 1.3"),
    ]


def _line(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def run() -> list[Figure]:
    """Starts a worker and a producer and measures."""
    model = fingerprint(Path(resolve_checkpoint("demo")))
    with worker("decode", "--model", "demo") as decode:
        code = f"from bench.step_jitter import produce; produce({decode.address!r}, {model!r})"
        producer = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            return asyncio.run(measure(decode.address, producer))
        finally:
            producer.kill()
            producer.communicate()
