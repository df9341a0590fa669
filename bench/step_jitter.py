"""How much a decode step suffers while another request's KV arrives at full speed, between real processes.

One stream decodes all the time; its steps are timed by its client, from one token's arrival to the next, so that
whatever delays a token counts. A producer beside it pushes KV as fast as the worker takes it, in turns with silence.
The producer has the lowest priority: in a fleet it has a machine of its own, and its cycles are not what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from bench.figures import SEED, Figure, figure, ratios
from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import StreamWriter, build_manifest, codec, encode_frame, validate_manifest
from hma_serve.rpc import deadline_in, open_channel, tune_allocator
from hma_serve.v1 import common_pb2, decode_pb2, decode_pb2_grpc, kv_block_pb2, kv_transfer_pb2

STEPS = 400
ROUNDS = 5
PACKED_TOKENS = 2048
CODEC = "bf16"
PUSH = "/hma_serve.v1.KvTransfer/Push"
ROLES = (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V)
_SERVING = re.compile(r"gRPC (\S+), HTTP")


@contextlib.contextmanager
def decode_worker() -> Iterator[str]:
    """A running decode worker's address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hma_serve.cli.main", "decode", "--model", "demo", "--etcd", "none"),
            *("--listen", "127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := _SERVING.search(line):
                yield found[1]
                break
        else:
            raise RuntimeError("the decode worker did not start")
    finally:
        process.kill()
        process.communicate()


def request(prompt: list[int], new_tokens: int, packed: int, offer: decode_pb2.KvOffer) -> Any:
    """A greedy request, its first tokens' KV packed or none."""
    return decode_pb2.DecodeGenerateRequest(
        context=common_pb2.RequestContext(request_id="bench", epoch=1, deadline=deadline_in(600)),
        prompt_token_ids=prompt,
        packed_tokens=packed,
        offer=offer if packed else None,
        sampling=common_pb2.SamplingParams(temperature=0.0),
        stop=common_pb2.StopConditions(max_tokens=new_tokens, ignore_eos=True),
    )


class Producer:
    """Sends the KV of one prompt after the other, none of which is ever committed, so that none joins the batch."""

    def __init__(self, channel: grpc.aio.Channel, config: ModelConfig, model: str) -> None:
        self._channel = channel
        self._rope = kv_block_pb2.KvRope(pairing=kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT, theta=config.rope_theta)
        self._layers = config.num_layers
        spec = codec(CODEC).spec()
        self._offer = decode_pb2.KvOffer(
            model_fingerprint=model, k_codec=spec, v_codec=spec, rope=self._rope, producer_instance="bench"
        )
        self._manifest = build_manifest(
            model_fingerprint=model,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            k_codec=codec(CODEC),
            token_start=0,
            token_count=PACKED_TOKENS,
            rope=self._rope,
            qk_norm=True,
        )
        shape = (config.num_kv_heads, PACKED_TOKENS, config.head_dim)
        values = np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)
        self._packed = codec(CODEC).encode(values)

    async def push_once(self) -> int:
        """One prompt's KV; returns its bytes once the worker has stored every block."""
        stub: Any = decode_pb2_grpc.DecodeStub(self._channel)
        call = stub.Generate(request([3] * (PACKED_TOKENS + 1), 1, PACKED_TOKENS, self._offer))
        ticket = (await call.read()).ticket
        writer = StreamWriter(validate_manifest(self._manifest), ticket.nonce, ticket.epoch)
        method: Any = self._channel.stream_stream(
            PUSH, request_serializer=None, response_deserializer=kv_transfer_pb2.PushResponse.FromString
        )
        stream = method()
        await stream.write(encode_frame(self._opening(ticket)))
        credit = (await stream.read()).accepted.credit_bytes
        for header, payload in self._blocks(writer):
            while writer.payload_bytes > credit:
                credit = (await stream.read()).ack.credit_bytes
            await stream.write(encode_frame(header, payload))
        while (await stream.read()).ack.blocks < writer.sent:
            pass
        stream.cancel()
        call.cancel()
        return writer.payload_bytes

    def _opening(self, ticket: Any) -> kv_transfer_pb2.PushHeader:
        return kv_transfer_pb2.PushHeader(
            open=kv_transfer_pb2.PushOpen(
                ticket=ticket.nonce,
                epoch=ticket.epoch,
                transports=[kv_transfer_pb2.TRANSPORT_GRPC],
                manifest=self._manifest,
            )
        )

    def _blocks(self, writer: StreamWriter) -> Iterator[Any]:
        for layer in range(self._layers):
            for role in ROLES:
                last = (layer, role) == (self._layers - 1, ROLES[-1])
                yield from writer.blocks(layer, role, self._packed, token_start=0, last=last)


def produce(address: str, model: str) -> None:
    """Main of the child: pushes from each line on standard input to the next, and prints its bytes per second."""
    os.nice(19)
    tune_allocator()
    asyncio.run(_produce(address, model))


async def _produce(address: str, model: str) -> None:
    loop = asyncio.get_running_loop()
    channel = open_channel(address)
    producer = Producer(channel, read_model_config(resolve_checkpoint("demo")), model)
    while await loop.run_in_executor(None, sys.stdin.readline):
        stop = loop.run_in_executor(None, sys.stdin.readline)
        start, sent = time.perf_counter(), 0
        while not stop.done():
            sent += await producer.push_once()
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
            call = stub.Generate(request([3] * 64, 3 * STEPS, 0, decode_pb2.KvOffer()))
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
    with decode_worker() as address:
        code = f"from bench.step_jitter import produce; produce({address!r}, {model!r})"
        producer = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            return asyncio.run(measure(address, producer))
        finally:
            producer.kill()
            producer.communicate()
