"""A real decode worker for tests, and the calls that a router and a prefill worker would make."""

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import torch
import transformers

from hma_serve.checkpoint import fingerprint
from hma_serve.core.errors import (
    HmaError,
)
from hma_serve.kvblock import Codec, StreamWriter, build_manifest, codec, encode_frame, validate_manifest
from hma_serve.prefill.profiles import find_profile
from hma_serve.rpc import from_error_detail, from_rpc_error
from hma_serve.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    kv_block_pb2,
    kv_transfer_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from support.cluster import descendants
from support.deadlines import deadline_in
from support.metrics import metric_in
from support.reference import reference_packed_kv
from support.tiny_qwen3 import make_tiny_checkpoint

LAYERS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW, MAX_RUNNING = 3, 2, 32, 320, 1024, 6
THETA = 10000.0
NEW_TOKENS = 8
START_SECONDS = 60.0
LEASE = 4.0
ROPE = kv_block_pb2.KvRope(pairing=kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT, theta=THETA)
_SERVING = re.compile(r"gRPC (\S+), HTTP (\S+);")


@dataclass
class Worker:
    """A running `hma-serve decode`."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    address: str = ""
    http: str = ""

    def wait_serving(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := _SERVING.search(line):
                self.address, self.http = found.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self.drainer = threading.Thread(target=self.lines.extend, args=(self.process.stderr,), daemon=True)
        self.drainer.start()

    @property
    def engine_pid(self) -> int:
        (pid,) = descendants(self.process.pid)
        return pid

    async def metric(self, name: str) -> float:
        """A metric by its name after `hma_decode_`."""
        async with httpx.AsyncClient() as http:
            return metric_in((await http.get(f"http://{self.http}/metrics")).text, f"hma_decode_{name}")


def make_checkpoint(directory: Path) -> Path:
    """Writes the model that the workers here serve."""
    return make_tiny_checkpoint(
        directory,
        layers=LAYERS,
        heads=8,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab=VOCAB,
        max_position_embeddings=WINDOW,
    )


@contextlib.contextmanager
def running_worker(checkpoint: Path, *arguments: str) -> Iterator[Worker]:
    command = [sys.executable, "-m", "hma_serve.cli.main", "decode", "--model", str(checkpoint), "--etcd", "none"]
    command += ["--listen", "127.0.0.1:0", "--threads", "1", "--dtype", "float32", "--max-running", str(MAX_RUNNING)]
    command += ["--kv-lease", str(LEASE), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    worker = Worker(process)
    try:
        worker.wait_serving()
        watchdog.cancel()
        yield worker
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        assert process.stderr is not None
        worker.drainer.join(5)
        process.stderr.close()


packed_kv = functools.cache(reference_packed_kv)


def codecs(profile: str) -> tuple[Codec, Codec]:
    """Of keys and of values."""
    known = find_profile(profile)
    return codec(known.k_codec), codec(known.v_codec)


class Client:
    """The calls of a router and of a prefill worker."""

    _tenants = itertools.count()

    def __init__(self, channel: grpc.aio.Channel, checkpoint: Path) -> None:
        self.channel = channel
        self.checkpoint = checkpoint
        self.decode = decode_pb2_grpc.DecodeStub(channel)
        self.worker = worker_pb2_grpc.WorkerStub(channel)

    def request(
        self, prompt: Sequence[int], packed: int = 0, profile: str = "f32", *, tenant: str | None = None, **stop: Any
    ) -> decode_pb2.DecodeGenerateRequest:
        """A request; unless told whose, of a tenant of its own, so that it finds no other's prompt."""
        k_codec, v_codec = codecs(profile)
        offer = decode_pb2.KvOffer(
            model_fingerprint=fingerprint(self.checkpoint),
            k_codec=k_codec.spec(),
            v_codec=v_codec.spec(),
            rope=ROPE,
            producer_instance="test",
            profile=profile,
        )
        return decode_pb2.DecodeGenerateRequest(
            context=common_pb2.RequestContext(
                request_id="test",
                epoch=1,
                deadline=deadline_in(60),
                tenant=f"tenant {next(self._tenants)}" if tenant is None else tenant,
            ),
            prompt_token_ids=prompt,
            packed_tokens=packed,
            offer=offer if packed else None,
            sampling=common_pb2.SamplingParams(temperature=0.0),
            stop=common_pb2.StopConditions(**({"max_tokens": NEW_TOKENS, "ignore_eos": True} | stop)),
        )

    async def generate(
        self, request: decode_pb2.DecodeGenerateRequest, profile: str = "f32"
    ) -> list[decode_pb2.DecodeGenerateResponse]:
        """Both legs of a request; all responses."""
        if request.packed_tokens:
            # Before the ticket's lease runs.
            packed_kv(self.checkpoint, profile, tuple(request.prompt_token_ids[: request.packed_tokens]))
        call = self.decode.Generate(request, timeout=60)
        responses = [await first(call)]
        if responses[0].ticket.present_tokens < request.packed_tokens:
            await self.push(request.prompt_token_ids[: request.packed_tokens], responses[0].ticket, profile)
        return responses + await rest(call)

    async def push(
        self,
        tokens: Sequence[int],
        ticket: decode_pb2.Ticket,
        profile: str = "f32",
        *,
        epoch: int | None = None,
        change: Callable[[list[bytes]], list[bytes]] = lambda frames: frames,
        pause: Callable[[], Awaitable[None]] | None = None,
        **manifest: Any,
    ) -> list[kv_transfer_pb2.PushResponse]:
        """Sends a prompt's KV as the reference computes it, with a pause before the last frame; all responses."""
        epoch = ticket.epoch if epoch is None else epoch
        frames = self.frames(tokens, ticket.nonce, epoch, profile, start=ticket.present_tokens, **manifest)
        method = self.channel.stream_stream(
            "/hma_serve.v1.KvTransfer/Push",
            request_serializer=lambda frame: frame,
            response_deserializer=kv_transfer_pb2.PushResponse.FromString,
        )
        *head, last = change(frames)

        async def paced() -> AsyncIterator[bytes]:
            for frame in head:
                yield frame
            if pause is not None:
                await pause()
            yield last

        return [response async for response in method(paced(), timeout=30)]

    def frames(
        self, tokens: Sequence[int], nonce: bytes, epoch: int, profile: str, *, start: int = 0, **manifest: Any
    ) -> list[bytes]:
        k_codec, v_codec = codecs(profile)
        described: Any = {
            "model_fingerprint": fingerprint(self.checkpoint),
            "layers": LAYERS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "k_codec": k_codec,
            "v_codec": v_codec,
            "token_start": start,
            "token_count": len(tokens) - start,
            "rope": ROPE,
            "qk_norm": True,
        }
        said = build_manifest(**(described | manifest))
        opened = kv_transfer_pb2.PushOpen(
            ticket=nonce, epoch=epoch, transports=[kv_transfer_pb2.TRANSPORT_GRPC], manifest=said
        )
        frames = [encode_frame(kv_transfer_pb2.PushHeader(open=opened))]
        writer = StreamWriter(validate_manifest(said), nonce, epoch)
        for layer, roles in enumerate(packed_kv(self.checkpoint, profile, tuple(tokens))):
            for role, packed in zip((kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V), roles, strict=True):
                rest = packed.numpy()[:, start // 32 :]
                frames += writer.frames(layer, role, rest, token_start=start, max_payload=20_000)
        end = kv_transfer_pb2.PushEnd(blocks=writer.sent)
        return [*frames, encode_frame(kv_transfer_pb2.PushHeader(end=end))]

    async def load(self, settled: Callable[[worker_pb2.WorkerLoad], bool]) -> worker_pb2.WorkerLoad:
        """The first load for which `settled` holds."""
        call = self.worker.WatchLoad(worker_pb2.WatchLoadRequest(), timeout=20)
        try:
            async for response in call:
                if settled(response.load):
                    return response.load
        finally:
            call.cancel()
        raise AssertionError("the load's stream ended")

    async def idle(self) -> worker_pb2.WorkerLoad:
        return await self.load(lambda load: not (load.running or load.waiting or load.kv_used_tokens))


@contextlib.asynccontextmanager
async def connected(worker: Worker, checkpoint: Path) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        yield Client(channel, checkpoint)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


async def first(call: Any) -> decode_pb2.DecodeGenerateResponse:
    response = await call.read()
    assert isinstance(response, decode_pb2.DecodeGenerateResponse)
    return response


async def rest(call: Any) -> list[decode_pb2.DecodeGenerateResponse]:
    """Everything up to the stream's end."""
    responses = []
    while isinstance(response := await call.read(), decode_pb2.DecodeGenerateResponse):
        responses.append(response)
    return responses


def emitted(responses: Sequence[decode_pb2.DecodeGenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.tokens.token_ids]


async def refusal(call: Any) -> HmaError:
    with pytest.raises(grpc.RpcError) as refused:
        await call
    return from_rpc_error(refused.value)


async def refused_push(responses: Any) -> HmaError:
    """The error of a stream that ended with exactly one refusal."""
    received = await responses
    assert received[-1].WhichOneof("event") == "refused"
    assert all(response.WhichOneof("event") in ("accepted", "ack") for response in received[:-1])
    return from_error_detail(received[-1].refused.error)


def by_transformers(checkpoint: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    results = []
    for tokens in prompts:
        ids = torch.tensor([tokens])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        results.append(out[0, len(tokens) :].tolist())
    return results
