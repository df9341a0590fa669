"""How fast KV crosses a process boundary through the product's own framing, beside `sendall` and `recv_into`.

The producer is a child process with packed KV in numpy arrays; the consumer, this process, ends with the bytes in a
numpy array: once with every block validated and its checksum verified, as decode does, and once without, which is what
gRPC and the framing cost by themselves.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from bench.figures import SEED, Figure, figure, interleave, ratios
from hma_serve.kvblock import (
    StreamReader,
    StreamWriter,
    align_payload,
    build_manifest,
    codec,
    decode_frame,
    encode_frame,
    validate_manifest,
)
from hma_serve.rpc import GrpcServer, open_channel, tune_allocator
from hma_serve.v1.kv_block_pb2 import KV_ROLE_K, KV_ROLE_V, KV_ROPE_PAIRING_HALF_SPLIT, KvManifest, KvRope

BLOCK_BYTES = 1 << 20
LAYERS, HEADS, HEAD_DIM = 128, 8, 128
REPEATS = 15
METHOD = "/hma_serve.bench/Push"
TICKET = bytes(16)


def manifest() -> KvManifest:
    """One block of 1 MiB per layer and role."""
    name = codec("bf16")
    tokens = BLOCK_BYTES // (HEADS * HEAD_DIM * 2)
    return build_manifest(
        model_fingerprint="bench",
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        k_codec=name,
        token_start=0,
        token_count=tokens,
        rope=KvRope(pairing=KV_ROPE_PAIRING_HALF_SPLIT, theta=1e6),
        qk_norm=True,
    )


def packed() -> NDArray[np.uint8]:
    """One layer and role of finite BF16 values, packed."""
    tokens = BLOCK_BYTES // (HEADS * HEAD_DIM * 2)
    values = np.random.default_rng(SEED).standard_normal((HEADS, tokens, HEAD_DIM)).astype(np.float32)
    return codec("bf16").encode(values)


async def push(address: str) -> None:
    """The producer's gRPC side: sends the whole stream once."""
    plan, payload = validate_manifest(manifest()), packed()

    async def frames() -> AsyncIterator[bytes]:
        writer = StreamWriter(plan, TICKET, 1)
        for layer in range(LAYERS):
            for role in (KV_ROLE_K, KV_ROLE_V):
                last = (layer, role) == (LAYERS - 1, KV_ROLE_V)
                blocks = writer.blocks(layer, role, payload, token_start=0, last=last, max_payload=BLOCK_BYTES)
                for header, part in blocks:
                    align_payload(header, part.nbytes)
                    yield encode_frame(header, part)

    channel = open_channel(address)
    method: Any = channel.stream_unary(METHOD)
    await method(frames())
    await channel.close()


def send_plain(port: int) -> None:
    """The producer's socket side."""
    payload = packed()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2 * LAYERS):
            connection.sendall(payload.data)


def produce(kind: str, target: str) -> None:
    """Main of the child: one stream for each line on standard input."""
    tune_allocator()
    for _ in sys.stdin:
        if kind == "grpc":
            asyncio.run(push(target))
        else:
            send_plain(int(target))


class Consumer:
    """Receives streams and knows how long each took, from its first byte to its last."""

    def __init__(self) -> None:
        self.destination = np.empty((2 * LAYERS, BLOCK_BYTES), dtype=np.uint8)
        self.received = asyncio.Event()
        self.checks = True
        self.seconds = 0.0

    async def receive(self, requests: AsyncIterator[bytes], _context: object) -> bytes:
        """The gRPC handler."""
        reader, start = StreamReader(validate_manifest(manifest()), TICKET, 1), None
        async for message in requests:
            start = start or time.perf_counter()
            header, payload = decode_frame(message)
            if self.checks:
                reader.validate(header.block, payload)
            self.destination[header.block.sequence] = np.frombuffer(payload, dtype=np.uint8)
        self.seconds = time.perf_counter() - (start or 0.0)
        self.received.set()
        return b""

    def receive_plain(self, listener: socket.socket) -> None:
        """The socket reference."""
        connection, _ = listener.accept()
        with connection:
            start = time.perf_counter()
            view = self.destination.reshape(-1).data
            received = 0
            while received < len(view):
                received += connection.recv_into(view[received:])
            self.seconds = time.perf_counter() - start


def child(kind: str, target: str) -> subprocess.Popen[bytes]:
    """Starts a producer."""
    code = f"from bench.kv_stream import produce; produce({kind!r}, {target!r})"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


async def serve(consumer: Consumer) -> tuple[GrpcServer, str]:
    """Starts the consumer's gRPC server."""
    server = GrpcServer("bench", "127.0.0.1:0", [])
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(consumer.receive)
    generic = grpc.method_handlers_generic_handler("hma_serve.bench", {"Push": handler})
    server.server.add_generic_rpc_handlers((generic,))
    return server, await server.start()


def run() -> list[Figure]:
    """Measures both in turn."""
    tune_allocator()
    consumer = Consumer()
    total = consumer.destination.nbytes / 1e9
    with asyncio.Runner() as runner, socket.create_server(("127.0.0.1", 0)) as listener:
        server, address = runner.run(serve(consumer))
        over_grpc, plain = child("grpc", address), child("plain", str(listener.getsockname()[1]))

        def rate_grpc(*, checks: bool) -> float:
            consumer.checks = checks
            consumer.received.clear()
            _go(over_grpc)
            runner.run(asyncio.wait_for(consumer.received.wait(), 60))
            return total / consumer.seconds

        def rate_plain() -> float:
            _go(plain)
            consumer.receive_plain(listener)
            return total / consumer.seconds

        try:
            checked, unchecked, plain_rates = interleave(
                REPEATS, lambda: rate_grpc(checks=True), lambda: rate_grpc(checks=False), rate_plain
            )
        finally:
            for process in (over_grpc, plain):
                process.kill()
                process.communicate()
            runner.run(server.stop(0))
    return [
        figure("plain sockets", plain_rates, "GB/s"),
        figure("gRPC, validated and checked", checked, "GB/s"),
        figure("gRPC, as it comes", unchecked, "GB/s"),
        figure("gRPC, as it comes / plain sockets", ratios(unchecked, plain_rates), "x"),
        figure("gRPC, validated and checked / plain sockets", ratios(checked, plain_rates), "x", "at least 0.40"),
    ]


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
