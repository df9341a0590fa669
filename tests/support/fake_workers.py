"""Prefill and decode workers that speak the real protocol over real sockets and compute nothing.

For what a router must survive: each fake can be told to refuse, to stall, to fail after some tokens, or to die. A fake
decode answers with the prompt's own tokens, over and over, so that every test knows what must come back. KV does not
move: a fake prefill tells the fake decode, found by its address, that the prompt has arrived.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import tokenizers
from google.protobuf import duration_pb2
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from hma_serve.core.errors import HmaError, NotFound
from hma_serve.core.worker import (
    CodecSpec,
    KvCodecId,
    KvRopePairing,
    ModelInfo,
    RopeSpec,
    WorkerInfo,
    WorkerLimits,
    WorkerRole,
    WorkerState,
    mint_instance,
)
from hma_serve.registry import FleetSnapshot
from hma_serve.router.config import RouterConfig
from hma_serve.router.fleet import Fleet
from hma_serve.router.model import ServedModel
from hma_serve.router.pipeline import Pipeline, run_pipeline
from hma_serve.rpc import GrpcServer
from hma_serve.telemetry.metrics import router_metrics
from hma_serve.text import ChatTemplate, Tokenizer
from hma_serve.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

EOS = 256
VOCAB = 257
MODEL_NAME = "fake"
WINDOW = 512

_DECODES: dict[str, FakeDecode] = {}


def byte_tokenizer_json() -> str:
    """A byte-level tokenizer whose token ids are the bytes, in the alphabet's order, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    text: str = tokenizer.to_str()
    return text


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fake_model(fingerprint: str = "", *, template: str | None = CHAT_TEMPLATE) -> ServedModel:
    """A served model without a checkpoint."""
    chat_template = ChatTemplate(template) if template is not None else None
    tokenizer = Tokenizer(byte_tokenizer_json())
    return ServedModel(MODEL_NAME, fingerprint, VOCAB, WINDOW, tokenizer, chat_template, created=1)


def write_fake_checkpoint(directory: Path) -> Path:
    """What a router reads of a checkpoint: configuration and tokenizer, no weights."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(byte_tokenizer_json())
    return directory


def fake_worker(
    role: WorkerRole,
    *,
    address: str = "127.0.0.1:1",
    instance: str = "",
    codecs: Iterable[KvCodecId] = (KvCodecId.F32,),
    max_running: int = 8,
    max_waiting: int = 0,
    max_model_len: int = WINDOW,
    kv_capacity_tokens: int = 0,
    overcommit: bool = False,
    fingerprint: str = "f" * 64,
    state: WorkerState = WorkerState.READY,
) -> WorkerInfo:
    """A record with the fields that placement looks at."""
    return WorkerInfo(
        instance=instance or mint_instance(role),
        role=role,
        address=address,
        model=ModelInfo(MODEL_NAME, fingerprint, 1, 32, 2, 1, 16, VOCAB, RopeSpec(KvRopePairing.HALF_SPLIT, 1e4)),
        codecs=tuple(map(CodecSpec, codecs)),
        limits=WorkerLimits(max_model_len, max_running, max_waiting, kv_capacity_tokens, overcommit),
        state=state,
        epoch=1,
    )


class FakeRegistry:
    """A registry's watcher whose contents a test sets; confined to the loop."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self._callbacks: list[Callable[[FleetSnapshot], None]] = []
        self._snapshot = FleetSnapshot(listed=True)
        self.put(*workers)

    def put(self, *workers: WorkerInfo) -> None:
        """From now on these are registered, and no others."""
        contents = MappingProxyType({worker.instance: worker for worker in workers})
        self._snapshot = replace(self._snapshot, workers=contents)
        for callback in self._callbacks:
            callback(self._snapshot)

    def subscribe(
        self, callback: Callable[[FleetSnapshot], None], loop: asyncio.AbstractEventLoop | None = None
    ) -> Callable[[], None]:
        self._callbacks.append(callback)
        callback(self._snapshot)
        return lambda: self._callbacks.remove(callback)


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """What both fakes share: a server, a record, a load stream.

    Attributes:
        info: The record; its address is known once the server runs.
        load: What the load stream reports; call `report` after a change.
        calls: Requests received.
        active: Requests being served now.
        cancelled: Requests whose caller went away.
        described: Times that somebody asked who this is.
    """

    def __init__(self, info: WorkerInfo, *services: str) -> None:
        self.info = info
        self.load = worker_pb2.WorkerLoad(state=worker_pb2.WORKER_STATE_READY)
        self.calls: list[Any] = []
        self.seconds_left: list[float | None] = []
        self.active = 0
        self.cancelled = 0
        self.described = 0
        self._report = asyncio.Event()
        self._idle = asyncio.Condition()
        self._server = GrpcServer(info.role, info.address, services)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server.server)

    @property
    def grpc_server(self) -> Any:
        return self._server.server

    async def start(self) -> None:
        self.info = replace(self.info, address=await self._server.start())

    async def stop(self) -> None:
        """Ends at once, as a killed process does: calls break, new connections are refused."""
        self._report.set()
        await self._server.stop(0)

    def report(self) -> None:
        self._report.set()

    async def until_idle(self) -> None:
        """Waits until no request is being served."""
        async with self._idle:
            await self._idle.wait_for(lambda: not self.active)

    async def until_described(self, times: int) -> None:
        """Waits until somebody has asked so many times who this is."""
        async with self._idle:
            await self._idle.wait_for(lambda: self.described >= times)

    async def until_active(self, count: int = 1) -> None:
        """Waits until `count` requests are being served."""
        async with self._idle:
            await self._idle.wait_for(lambda: self.active >= count)

    @asynccontextmanager
    async def _serving(self, request: object, context: Any) -> AsyncIterator[None]:
        self.calls.append(request)
        self.seconds_left.append(context.time_remaining())
        await self._count(1)
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            await asyncio.shield(self._count(-1))

    async def _count(self, change: int) -> None:
        async with self._idle:
            self.active += change
            self._idle.notify_all()

    async def Describe(self, request: worker_pb2.DescribeRequest, context: object) -> worker_pb2.DescribeResponse:
        async with self._idle:
            self.described += 1
            self._idle.notify_all()
        return worker_pb2.DescribeResponse(worker=self.info.to_proto())

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: object
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        while True:
            yield worker_pb2.WatchLoadResponse(load=self.load)
            self._report.clear()
            try:
                async with asyncio.timeout(request.interval.ToNanoseconds() / 1e9):
                    await self._report.wait()
            except TimeoutError:
                continue

    async def Drain(self, request: worker_pb2.DrainRequest, context: object) -> worker_pb2.DrainResponse:
        await self.until_idle()
        return worker_pb2.DrainResponse()


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServicer):
    """Answers with the prompt's tokens, over and over, behind those that were emitted before.

    Attributes:
        refusals: Raised one after the other instead of giving a ticket.
        broken: So many calls end as if the connection had.
        gate: Tokens come only while it is set.
        silent: Never give a ticket.
        fail_after: Raise `failure` when so many tokens have been sent.
        failure: What to raise then.
        break_after: End once as if the connection had when so many tokens have been sent.
        lose_the_end: End as if the connection had when all tokens have been sent.
        stall_after: Send nothing more when so many tokens have been sent.
        eos_after: End by itself after so many tokens.
        per_message: Tokens in one message.
        present_tokens: What the tickets claim to hold already.
        lease: Of the tickets.
        renewals: Leases renewed.
    """

    def __init__(self, info: WorkerInfo | None = None) -> None:
        super().__init__(info or fake_worker(WorkerRole.DECODE, address="127.0.0.1:0"), "hma_serve.v1.Decode")
        decode_pb2_grpc.add_DecodeServicer_to_server(self, self.grpc_server)
        self.refusals: list[HmaError] = []
        self.broken = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.silent = False
        self.fail_after: int | None = None
        self.failure: HmaError = NotFound("unset")
        self.break_after: int | None = None
        self.lose_the_end = False
        self.stall_after: int | None = None
        self.eos_after: int | None = None
        self.per_message = 1
        self.lease = duration_pb2.Duration(seconds=30)
        self.renewals = 0
        self.present_tokens = 0
        self._arrived: dict[bytes, asyncio.Event] = {}

    async def start(self) -> None:
        await super().start()
        _DECODES[self.info.address] = self

    async def stop(self) -> None:
        _DECODES.pop(self.info.address, None)
        await super().stop()

    async def until_renewed(self, times: int) -> None:
        """Waits until so many leases have been renewed."""
        async with self._idle:
            await self._idle.wait_for(lambda: self.renewals >= times)

    def deliver(self, nonce: bytes) -> None:
        """The prompt's KV is complete."""
        if nonce not in self._arrived:
            raise NotFound("no such ticket")
        self._arrived[nonce].set()

    async def Extend(self, request: decode_pb2.ExtendRequest, context: object) -> decode_pb2.ExtendResponse:
        if request.nonce not in self._arrived:
            raise NotFound("no such ticket")
        async with self._idle:
            self.renewals += 1
            self._idle.notify_all()
        return decode_pb2.ExtendResponse(lease=self.lease)

    async def Release(self, request: decode_pb2.ReleaseRequest, context: object) -> decode_pb2.ReleaseResponse:
        return decode_pb2.ReleaseResponse()

    async def Generate(
        self, request: decode_pb2.DecodeGenerateRequest, context: Any
    ) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        async with self._serving(request, context):
            if self.refusals:
                raise self.refusals.pop(0)
            if self.broken:
                self.broken -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            if self.silent:
                await asyncio.Event().wait()
            nonce = secrets.token_bytes(16)
            self._arrived[nonce] = asyncio.Event()
            try:
                ticket = decode_pb2.Ticket(
                    nonce=nonce,
                    epoch=request.context.epoch,
                    push_address=self.info.address,
                    present_tokens=self.present_tokens,
                    lease=self.lease,
                )
                yield decode_pb2.DecodeGenerateResponse(ticket=ticket)
                if request.packed_tokens > self.present_tokens:
                    await self._arrived[nonce].wait()
                yield decode_pb2.DecodeGenerateResponse(started=decode_pb2.DecodeStarted())
                async for response in self._tokens(request, context):
                    yield response
            finally:
                del self._arrived[nonce]

    async def _tokens(
        self, request: decode_pb2.DecodeGenerateRequest, context: Any
    ) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        prompt = request.prompt_token_ids
        limit = request.stop.max_tokens
        end = limit if self.eos_after is None or request.stop.ignore_eos else min(limit, self.eos_after)
        for start in range(len(request.emitted_token_ids), end, self.per_message):
            await self.gate.wait()
            if self.break_after is not None and start >= self.break_after:
                self.break_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            if self.fail_after is not None and start >= self.fail_after:
                raise self.failure
            if self.stall_after is not None and start >= self.stall_after:
                await asyncio.Event().wait()
            ids = [prompt[i % len(prompt)] for i in range(start, min(start + self.per_message, end))]
            tokens = decode_pb2.DecodeTokens(token_ids=ids)
            if request.sampling.HasField("logprobs"):
                chosen = [common_pb2.TokenLogprob(token_id=token, logprob=-0.5) for token in ids]
                tokens.logprobs.extend(
                    common_pb2.TokenLogprobs(chosen=one, top=[one] * request.sampling.logprobs) for one in chosen
                )
            yield decode_pb2.DecodeGenerateResponse(tokens=tokens)
        if self.lose_the_end:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        finished = decode_pb2.DecodeFinished(reason=common_pb2.FINISH_REASON_LENGTH)
        if end < limit:
            finished.reason = common_pb2.FINISH_REASON_STOP
            finished.stop_token_id = EOS
        yield decode_pb2.DecodeGenerateResponse(finished=finished)


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServicer):
    """Accepts, and tells decode that the prompt is there.

    Attributes:
        refusals: Raised one after the other instead of accepting.
        failures: Raised one after the other after accepting.
        stalled: Accept, then do nothing.
        late_failures: Raised one after the other when decode has the prompt already, once `late_gate` is set.
    """

    def __init__(self, info: WorkerInfo | None = None) -> None:
        super().__init__(info or fake_worker(WorkerRole.PREFILL, address="127.0.0.1:0"), "hma_serve.v1.Prefill")
        prefill_pb2_grpc.add_PrefillServicer_to_server(self, self.grpc_server)
        self.refusals: list[HmaError] = []
        self.failures: list[HmaError] = []
        self.stalled = False
        self.late_failures: list[HmaError] = []
        self.late_gate = asyncio.Event()

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        async with self._serving(request, context):
            if self.refusals:
                raise self.refusals.pop(0)
            yield prefill_pb2.PrefillResponse(accepted=prefill_pb2.PrefillAccepted(instance=self.info.instance))
            if self.failures:
                raise self.failures.pop(0)
            if self.stalled:
                await asyncio.Event().wait()
            _DECODES[request.decode_address].deliver(request.ticket)
            if self.late_failures:
                await self.late_gate.wait()
                raise self.late_failures.pop(0)
            completed = prefill_pb2.PrefillCompleted(computed_tokens=len(request.token_ids))
            yield prefill_pb2.PrefillResponse(completed=completed)


@asynccontextmanager
async def running_pipeline(
    *workers: FakeWorker, model: ServedModel | None = None, **settings: Any
) -> AsyncIterator[tuple[Pipeline, FakeRegistry]]:
    """A router's pipeline over fakes, once every registered worker is reachable; starts and stops the fakes too."""
    config = RouterConfig(registry="-", **settings)
    async with running(*workers):
        registry = FakeRegistry(*(worker.info for worker in workers))
        metrics = router_metrics(CollectorRegistry())
        async with run_pipeline(config, model or fake_model(), registry, metrics) as pipeline:
            await until(pipeline, lambda fleet: all(view.open for view in (*fleet.prefills, *fleet.decodes)))
            yield pipeline, registry


async def until(pipeline: Pipeline, condition: Callable[[Fleet], bool]) -> None:
    """Waits until the fleet is as it should be."""
    changed = asyncio.Event()
    unsubscribe = pipeline.keeper.subscribe(changed.set)
    try:
        while not condition(pipeline.keeper.fleet):
            await changed.wait()
            changed.clear()
    finally:
        unsubscribe()


@asynccontextmanager
async def running(*workers: FakeWorker) -> AsyncIterator[None]:
    """Starts the workers, and stops them afterwards."""
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.stop()
