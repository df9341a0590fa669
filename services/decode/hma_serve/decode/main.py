"""`hma-serve decode`: the front process of a decode worker, from the command line to the last drained request.

Order of life: status port (live, not ready) → the engine process loads the weights → gRPC listens → registration →
ready. And of death: draining, not serving → running requests end → deregistration → gRPC stops → the engine leaves. A
signal gives status 0; an engine that dies ends every stream with UNAVAILABLE, and the process with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial

from hma_serve.core.errors import HmaError
from hma_serve.core.worker import DeviceInfo, WorkerInfo, WorkerLimits, WorkerRole, mint_instance
from hma_serve.decode.admission import Admission
from hma_serve.decode.config import DecodeConfig, build_parser, config_of
from hma_serve.decode.drain import Drain
from hma_serve.decode.engine_client import EngineClient
from hma_serve.decode.front import DecodeServicer
from hma_serve.decode.load import Load
from hma_serve.decode.receiver import SERVICE as KV_TRANSFER
from hma_serve.decode.receiver import Receiver, ReceiverParts
from hma_serve.decode.served_model import ServedModel, read_served_model
from hma_serve.decode.worker_api import WorkerServicer
from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.ipc import Arena, SlotPool, spawn_engine
from hma_serve.kvblock import MAX_MESSAGE_BYTES
from hma_serve.registry import Session, SessionStatus, open_store
from hma_serve.rpc import GrpcServer, tune_allocator
from hma_serve.telemetry.http import StatusServer
from hma_serve.telemetry.logs import setup_logging
from hma_serve.telemetry.metrics import DecodeMetrics, decode_metrics
from hma_serve.v1 import decode_pb2_grpc, worker_pb2_grpc

__all__ = ["build_parser", "main"]

ENGINE_MODULE = "hma_serve.decode.engine_main"
SERVICES = ("hma_serve.v1.Decode", KV_TRANSFER, "hma_serve.v1.Worker")

_STOP_SECONDS = 2.0

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a decode worker until a signal; returns the exit status.

    Raises:
        HmaError: It cannot start, or its engine died; the message is for the user.
    """
    config = config_of(build_parser().parse_args(argv))
    setup_logging("decode", config.log_format)
    tune_allocator()
    asyncio.run(_run(config))
    return 0


async def _run(config: DecodeConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        worker = _Worker(config, stack)
        starting = asyncio.create_task(worker.start())
        # Until it is ready, nothing was promised to anybody, so a signal ends the start at once.
        await _first_of(starting, asyncio.create_task(stop.wait()))
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        engine_end = starting.result()
        await _first_of(engine_end, asyncio.create_task(stop.wait()))
        await worker.leave()
        if engine_end.done():
            raise engine_end.result()


async def _first_of(
    kept: asyncio.Task[asyncio.Task[HmaError]] | asyncio.Task[HmaError], dropped: asyncio.Task[bool]
) -> None:
    """Waits for either; the second one is over afterwards."""
    try:
        await asyncio.wait((kept, dropped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        dropped.cancel()


class _Worker:
    """One run of the process; what it opens is closed by `stack`, last first."""

    def __init__(self, config: DecodeConfig, stack: contextlib.AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._instance = mint_instance(WorkerRole.DECODE)
        self._load = Load()
        self._metrics = decode_metrics()
        self._session: Session | None = None
        self._drain: Drain | None = None

    async def start(self) -> asyncio.Task[HmaError]:
        """Returns when requests can come; the task ends when the engine does."""
        config, stack = self._config, self._stack
        status = StatusServer(config.http_listen, self._not_ready)
        http_address = await status.start()
        stack.push_async_callback(status.stop)
        model = await asyncio.to_thread(read_served_model, config.model, config.max_model_len)
        arena = stack.enter_context(Arena.create(config.arena_slots, MAX_MESSAGE_BYTES))
        slots = SlotPool(config.arena_slots)
        engine, engine_end = await stack.enter_async_context(self._engine(model, arena, slots))
        ready = await engine.ready()
        self._load.kv_capacity_tokens = ready.kv_capacity_tokens
        _show_load(self._metrics, self._load)
        servicer, server, drain = await self._serve(model, engine, arena, slots)
        bound = await server.start()
        stack.push_async_callback(server.stop, _STOP_SECONDS)
        info = self._info(model, config.advertised(bound), http_address, ready)
        servicer.push_address = info.address
        if config.etcd is not None:
            self._session = await stack.enter_async_context(self._registration(config.etcd, info))
        drain.registered(info, self._session)
        self._drain = drain
        _log.info(
            "serving %s in %s: gRPC %s, HTTP %s; KV for %d tokens in %.1f MiB",
            info.model.id,
            config.dtype,
            info.address,
            http_address,
            ready.kv_capacity_tokens,
            ready.kv_bytes / 2**20,
        )
        return engine_end

    async def leave(self) -> None:
        """Drains; the stack closes the rest."""
        if self._drain is not None:
            await self._drain.run(self._config.drain_grace)

    async def _serve(
        self, model: ServedModel, engine: EngineClient, arena: Arena, slots: SlotPool
    ) -> tuple[DecodeServicer, GrpcServer, Drain]:
        """The three services on a server that does not listen yet."""
        config = self._config
        server = GrpcServer("decode", config.listen, SERVICES)
        admission = Admission(model.max_model_len, model.config.vocab_size, model.acceptance)
        servicer = DecodeServicer(engine, admission, self._load, self._metrics)
        decode_pb2_grpc.add_DecodeServicer_to_server(servicer, server.server)
        parts = ReceiverParts(engine, arena, slots, model.acceptance, self._metrics, config.stall_timeout)
        Receiver(parts).add_to(server.server)
        drain = Drain(self._load, engine, partial(server.set_serving, serving=False))
        worker_api = WorkerServicer(drain, self._load, default_grace=config.drain_grace)
        worker_pb2_grpc.add_WorkerServicer_to_server(worker_api, server.server)
        return servicer, server, drain

    def _not_ready(self) -> str | None:
        if self._drain is None:
            return "the model is loading"
        if self._load.draining:
            return "draining"
        if self._session is not None and not self._session.status.routable:
            return f"not in the registry ({self._session.status.state})"
        return None

    @contextlib.asynccontextmanager
    async def _engine(
        self, model: ServedModel, arena: Arena, slots: SlotPool
    ) -> AsyncIterator[tuple[EngineClient, asyncio.Task[HmaError]]]:
        """The engine process and the task that speaks with it; both are over when the context is."""
        config = self._config
        flags = {
            "--checkpoint": model.checkpoint,
            "--dtype": config.dtype,
            "--codecs": ",".join(known.name for known in model.codecs),
            "--kv-capacity-tokens": config.capacity_tokens(model.config, model.max_model_len),
            "--kv-lease": config.kv_lease,
            "--max-running": config.max_running,
            "--step-tokens": config.step_tokens,
            "--threads": config.threads,
            "--log-format": config.log_format,
        }
        argv = [str(part) for pair in flags.items() for part in pair]
        process = await spawn_engine(ENGINE_MODULE, argv, receives=decode_engine_pb2.DecodeEngineEvent, arena=arena)
        client = EngineClient(process, slots, on_load=self._take_load)
        end = asyncio.create_task(client.run())
        try:
            yield client, end
        finally:
            await process.stop()
            await end

    def _take_load(self, load: decode_engine_pb2.DecodeEngineLoad) -> None:
        self._load.engine = load
        self._load.notify()

    @contextlib.asynccontextmanager
    async def _registration(self, etcd: str, info: WorkerInfo) -> AsyncIterator[Session]:
        store = open_store(etcd)

        def show(status: SessionStatus) -> None:
            self._metrics.registered.set(status.routable)

        try:
            async with Session(store, info, ttl=self._config.registry_ttl, on_status=show) as session:
                yield session
        finally:
            await asyncio.to_thread(store.close)

    def _info(
        self, model: ServedModel, address: str, http_address: str, ready: decode_engine_pb2.DecodeReady
    ) -> WorkerInfo:
        config = self._config
        return WorkerInfo(
            instance=self._instance,
            role=WorkerRole.DECODE,
            address=address,
            model=model.info,
            codecs=model.codec_specs,
            limits=WorkerLimits(model.max_model_len, config.max_running, 0, ready.kv_capacity_tokens),
            device=DeviceInfo(vendor="cpu", name=ready.device, price_per_hour=config.price_per_hour),
            http_address=http_address,
        )


def _show_load(metrics: DecodeMetrics, load: Load) -> None:
    """Lets the gauges read the load when they are scraped."""
    metrics.running.set_function(lambda: load.engine.running)
    metrics.waiting.set_function(lambda: load.engine.waiting)
    metrics.kv_used_tokens.set_function(lambda: load.engine.kv_used_tokens)
    metrics.kv_capacity_tokens.set(load.kv_capacity_tokens)
    metrics.step_seconds.set_function(lambda: load.engine.step_seconds)
    metrics.steps.set_function(lambda: load.engine.steps)


if __name__ == "__main__":
    sys.exit(main())
