"""`hma-serve prefill`: the front process of a prefill worker, from the command line to the last drained request.

Order of life: status port (live, not ready) → the engine process loads the weights → gRPC listens → registration →
ready. And of death: draining, not serving → running requests end → deregistration → gRPC stops → the engine leaves. A
signal gives status 0; an engine that dies ends every request with UNAVAILABLE, and the process with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial

from hma_serve.core.errors import HmaError
from hma_serve.core.worker import DeviceInfo, KvSupport, WorkerInfo, WorkerLimits, WorkerRole
from hma_serve.internal.v1 import prefill_engine_pb2
from hma_serve.ipc import Arena, spawn_engine
from hma_serve.prefill.admission import Admission
from hma_serve.prefill.capacity import decide_capacity
from hma_serve.prefill.config import PrefillConfig, build_parser, config_of
from hma_serve.prefill.engine_client import EngineClient
from hma_serve.prefill.events import LayerEvents
from hma_serve.prefill.front import FrontParts, PrefillServicer
from hma_serve.prefill.load import Load
from hma_serve.prefill.push_stream import Patience
from hma_serve.prefill.served_model import ServedModel, read_served_model, software
from hma_serve.prefill.streamer import Transfers
from hma_serve.rpc import ChannelCache, GrpcServer, tune_allocator
from hma_serve.telemetry.logs import setup_logging
from hma_serve.telemetry.metrics import PrefillMetrics, prefill_metrics
from hma_serve.telemetry.tracing import exporting_traces
from hma_serve.v1 import kv_block_pb2, prefill_pb2_grpc
from hma_serve.worker import WorkerFront, available_memory, run_worker

__all__ = ["build_parser", "main"]

ENGINE_MODULE = "hma_serve.prefill.engine_main"
SERVICES = ("hma_serve.v1.Prefill", "hma_serve.v1.Worker")

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a prefill worker until a signal; returns the exit status.

    Raises:
        HmaError: It cannot start, or its engine died; the message is for the user.
    """
    config = config_of(build_parser().parse_args(argv))
    setup_logging("prefill", config.log_format)
    tune_allocator()
    with exporting_traces("prefill"):
        asyncio.run(run_worker(partial(_Worker, config)))
    return 0


class _Worker:
    """One run of the process; what it opens is closed by `stack`, last first."""

    def __init__(self, config: PrefillConfig, stack: contextlib.AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._load = Load()
        self._metrics = prefill_metrics()
        self._front = WorkerFront(
            WorkerRole.PREFILL,
            config,
            self._load,
            stack,
            starting="starting",
            show_registered=self._metrics.registered.set,
        )

    async def start(self) -> asyncio.Task[HmaError]:
        """Returns when requests can come; the task ends when the engine does."""
        config, stack = self._config, self._stack
        _show_load(self._metrics, self._load)
        http_address = await self._front.open_status_port()
        model = await asyncio.to_thread(read_served_model, config)
        layout = model.layout
        self._load.expect(
            chunk_tokens=config.chunk_tokens,
            bytes_per_token=layout.token_bytes,
            layers=layout.layers,
        )
        arena = stack.enter_context(_arena(config, model))
        engine, engine_end = await stack.enter_async_context(_engine(config, model, arena, self._load))
        ready = await engine.ready()
        transfers = await stack.enter_async_context(self._transfers(model, arena, ready.device))
        servicer = PrefillServicer(
            FrontParts(
                instance=self._front.instance,
                admission=_admission(config, model),
                load=self._load,
                engine=engine,
                transfers=transfers,
                events=stack.enter_context(LayerEvents(config.events)),
                metrics=self._metrics,
            )
        )
        server = GrpcServer("prefill", config.listen, SERVICES, tls=config.tls())
        prefill_pb2_grpc.add_PrefillServicer_to_server(servicer, server.server)
        address = await self._front.listen(server, servicer.fail_all)
        info = self._info(model, address, http_address, ready.device)
        await self._front.register(info)
        _log.info("serving %s as %s: gRPC %s, HTTP %s", info.model.id, info.profile, info.address, http_address)
        return engine_end

    async def leave(self) -> None:
        """Drains."""
        result = await self._front.leave()
        _log.info("drained: %d requests finished, %d cancelled", result.finished, result.cancelled)

    @contextlib.asynccontextmanager
    async def _transfers(self, model: ServedModel, arena: Arena, device: str) -> AsyncIterator[Transfers]:
        producer = kv_block_pb2.KvProducer(instance=self._front.instance, device=device, software=software())
        channels = ChannelCache(tls=self._config.tls())
        try:
            yield Transfers(
                channels=channels,
                arena=arena,
                layout=model.layout,
                packed_as=model.packed_as,
                manifest=partial(model.manifest, producer=producer),
                patience=Patience(self._config.stall_timeout, self._config.resume_timeout),
                ranks=self._config.tp,
            )
        finally:
            await channels.close()

    def _info(self, model: ServedModel, address: str, http_address: str, device: str) -> WorkerInfo:
        config = self._config
        return WorkerInfo(
            instance=self._front.instance,
            role=WorkerRole.PREFILL,
            address=address,
            model=model.info,
            codecs=model.codecs,
            limits=WorkerLimits(model.max_tokens, config.max_running, config.max_waiting),
            device=DeviceInfo(vendor=config.device, name=device, price_per_hour=config.price_per_hour),
            profile=model.profile.name,
            http_address=http_address,
            kv=KvSupport.from_proto(model.support),
        )


def _arena(config: PrefillConfig, model: ServedModel) -> Arena:
    """A slot for each layer that may be under way; untouched ones take no memory."""
    return Arena.create(config.max_running * config.layers_ahead, model.layout.layer_bytes(config.chunk_tokens))


def _admission(config: PrefillConfig, model: ServedModel) -> Admission:
    return Admission(model.max_tokens, model.config.vocab_size, config.max_running + config.max_waiting, model.support)


@contextlib.asynccontextmanager
async def _engine(
    config: PrefillConfig, model: ServedModel, arena: Arena, load: Load
) -> AsyncIterator[tuple[EngineClient, asyncio.Task[HmaError]]]:
    """The engine process and the task that speaks with it; both are over when the context is."""
    capacity = decide_capacity(config, model, available_memory())
    flags: dict[str, object] = {
        "--checkpoint": model.checkpoint,
        "--device": config.device,
        "--profile": model.profile.name,
        "--chunk-tokens": config.chunk_tokens,
        "--layers-ahead": config.layers_ahead,
        "--max-running": config.max_running,
        "--max-waiting": config.max_waiting,
        "--max-tokens": model.max_tokens,
        "--kv-capacity-tokens": capacity.kv_tokens,
        "--overlap": config.overlap,
        "--prefix-cache-bytes": capacity.prefix_cache_bytes,
        "--fingerprint": model.info.kv_fingerprint or model.fingerprint,
        "--threads": max(1, config.threads // config.tp),
        "--tp": config.tp,
        "--log-format": config.log_format,
    }
    if capacity.decoded_bytes is not None:
        flags["--decoded-bytes"] = capacity.decoded_bytes // config.tp
    if config.profiles is not None:
        flags["--profiles"] = config.profiles
    if config.k_offsets is not None:
        flags["--k-offsets"] = config.k_offsets
    argv = [str(part) for pair in flags.items() for part in pair]
    process = await spawn_engine(ENGINE_MODULE, argv, receives=prefill_engine_pb2.PrefillEngineEvent, arena=arena)
    load.engine_silent_seconds = lambda: process.link.silent_seconds
    client = EngineClient(process)
    end = asyncio.create_task(client.run())
    watch = asyncio.create_task(process.watch(client.ready, config.engine_timeout))
    try:
        yield client, end
    finally:
        watch.cancel()
        await process.stop()
        await end


def _show_load(metrics: PrefillMetrics, load: Load) -> None:
    """Lets the gauges read the load when they are scraped."""
    metrics.running.set_function(lambda: load.running)
    metrics.waiting.set_function(lambda: load.waiting)
    metrics.queued_tokens.set_function(lambda: load.queued_tokens)


if __name__ == "__main__":
    sys.exit(main())
