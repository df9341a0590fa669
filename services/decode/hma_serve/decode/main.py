"""`hma-serve decode`: the front process of a decode worker, from the command line to the last drained request.

Order of life: status port (live, not ready) → the engine process loads the weights → gRPC listens → registration →
ready. And of death: draining, not serving → running requests end → deregistration → gRPC stops → the engine leaves. A
signal gives status 0; an engine that dies ends every stream with UNAVAILABLE, and the process with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial

from hma_serve.core.errors import HmaError
from hma_serve.core.worker import DeviceInfo, KvRopePairing, KvSupport, WorkerInfo, WorkerLimits, WorkerRole
from hma_serve.decode.admission import Admission
from hma_serve.decode.config import DTYPE_BYTES, DecodeConfig, build_parser, config_of
from hma_serve.decode.engine_client import EngineClient
from hma_serve.decode.front import DecodeServicer
from hma_serve.decode.load import Load
from hma_serve.decode.receiver import SERVICE as KV_TRANSFER
from hma_serve.decode.receiver import Receiver, ReceiverParts
from hma_serve.decode.receivers import EngineSockets, MetricsTally, running_receivers
from hma_serve.decode.served_model import ServedModel, read_served_model
from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.ipc import Arena, SlotPool, spawn_engine
from hma_serve.kvblock import MAX_MESSAGE_BYTES
from hma_serve.rpc import GrpcServer, tune_allocator
from hma_serve.telemetry.logs import setup_logging
from hma_serve.telemetry.metrics import DecodeMetrics, decode_metrics
from hma_serve.telemetry.tracing import exporting_traces
from hma_serve.v1 import decode_pb2_grpc
from hma_serve.worker import WorkerFront, run_worker

__all__ = ["build_parser", "main"]

ENGINE_MODULE = "hma_serve.decode.engine_main"
_VENDORS = {"cpu": "cpu", "cuda": "nvidia"}
SERVICES = ("hma_serve.v1.Decode", "hma_serve.v1.Worker")

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a decode worker until a signal; returns the exit status.

    Raises:
        HmaError: It cannot start, or its engine died; the message is for the user.
    """
    config = config_of(build_parser().parse_args(argv))
    setup_logging("decode", config.log_format)
    tune_allocator()
    with exporting_traces("decode"):
        asyncio.run(run_worker(partial(_Worker, config)))
    return 0


class _Worker:
    """One run of the process; what it opens is closed by `stack`, last first."""

    def __init__(self, config: DecodeConfig, stack: contextlib.AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._load = Load()
        self._metrics = decode_metrics()
        self._tally = MetricsTally(self._metrics)
        self._front = WorkerFront(
            WorkerRole.DECODE,
            config,
            self._load,
            stack,
            starting="the model is loading",
            show_registered=self._metrics.registered.set,
        )

    async def start(self) -> asyncio.Task[HmaError]:
        """Returns when requests can come; the task ends when the engine does."""
        config, stack = self._config, self._stack
        http_address = await self._front.open_status_port()
        model = await asyncio.to_thread(
            read_served_model, config.model, config.max_model_len, config.k_offsets, config.codecs
        )
        arena = stack.enter_context(Arena.create(config.arena_slots * max(1, config.receivers), MAX_MESSAGE_BYTES))
        slots = SlotPool(0 if config.receivers else config.arena_slots)
        sockets = stack.enter_context(contextlib.closing(EngineSockets(config.receivers)))
        engine, end = await stack.enter_async_context(self._engine(model, arena, slots, sockets))
        addresses: Sequence[str] = ()
        if config.receivers:
            running = await stack.enter_async_context(running_receivers(config, model, arena, sockets, self._tally))
            addresses, end = running.addresses, asyncio.create_task(_first_end(end, running.end))
        ready = await engine.ready()
        self._load.kv_capacity_tokens = ready.kv_capacity_tokens
        _show_load(self._metrics, self._load)
        servicer, server = self._services(model, engine, arena, slots)
        address = await self._front.listen(server, engine.fail_streams)
        info = self._info(model, address, http_address, ready)
        servicer.receive_at(addresses or [info.address])
        await self._front.register(info)
        _log.info(
            "serving %s in %s: gRPC %s, HTTP %s; KV for %d tokens in %.1f MiB",
            info.model.id,
            config.dtype,
            info.address,
            http_address,
            ready.kv_capacity_tokens,
            ready.kv_bytes / 2**20,
        )
        return end

    async def leave(self) -> None:
        """Drains; the stack closes the rest."""
        await self._front.leave()

    def _services(
        self, model: ServedModel, engine: EngineClient, arena: Arena, slots: SlotPool
    ) -> tuple[DecodeServicer, GrpcServer]:
        """Decode, and KvTransfer unless receivers have it, on a server that does not listen yet."""
        config = self._config
        services = SERVICES if config.receivers else (*SERVICES, KV_TRANSFER)
        server = GrpcServer("decode", config.listen, services, tls=config.tls())
        admission = Admission(
            model.max_model_len, model.config.vocab_size, model.acceptance, model.support, config.share_prefixes
        )
        servicer = DecodeServicer(engine, admission, self._load, self._metrics)
        decode_pb2_grpc.add_DecodeServicer_to_server(servicer, server.server)
        if not config.receivers:
            parts = ReceiverParts(
                engine,
                arena,
                slots,
                model.acceptance,
                self._tally,
                stall_timeout=config.stall_timeout,
                lease=config.kv_lease,
            )
            Receiver(parts).add_to(server.server)
        return servicer, server

    @contextlib.asynccontextmanager
    async def _engine(
        self, model: ServedModel, arena: Arena, slots: SlotPool, sockets: EngineSockets
    ) -> AsyncIterator[tuple[EngineClient, asyncio.Task[HmaError]]]:
        """The engine process and the task that speaks with it; both are over when the context is."""
        config = self._config
        flags = {
            "--checkpoint": model.checkpoint,
            "--device": config.device,
            "--dtype": config.dtype,
            "--codecs": ",".join(known.name for known in model.codecs),
            "--kv-capacity-tokens": _kv_capacity(config, model),
            "--max-model-len": model.max_model_len,
            "--kv-mode": config.kv_mode,
            "--overcommit": "yes" if config.overcommit else "no",
            "--kv-lease": config.kv_lease,
            "--max-running": config.max_running,
            "--step-tokens": config.step_tokens,
            "--threads": config.threads,
            "--log-format": config.log_format,
        }
        if config.k_offsets is not None:
            flags["--k-offsets"] = config.k_offsets
        argv = [str(part) for pair in flags.items() for part in pair]
        inherited = {"--receiver-fds": sockets.of_engine} if config.receivers else {}
        process = await spawn_engine(
            ENGINE_MODULE, argv, receives=decode_engine_pb2.DecodeEngineEvent, arena=arena, sockets=inherited
        )
        self._load.engine_silent_seconds = lambda: process.link.silent_seconds
        client = EngineClient(process.link, slots, on_load=self._take_load, places=1 + config.receivers)
        end = asyncio.create_task(client.run())
        watch = asyncio.create_task(process.watch(client.ready, config.engine_timeout))
        try:
            yield client, end
        finally:
            watch.cancel()
            await process.stop()
            await end

    def _take_load(self, load: decode_engine_pb2.DecodeEngineLoad) -> None:
        before = self._load.engine
        self._load.engine_said(load)
        self._metrics.late_blocks.inc(load.late_blocks - before.late_blocks)
        self._metrics.expired_tickets.inc(load.expired_tickets - before.expired_tickets)

    def _info(
        self, model: ServedModel, address: str, http_address: str, ready: decode_engine_pb2.DecodeReady
    ) -> WorkerInfo:
        config = self._config
        return WorkerInfo(
            instance=self._front.instance,
            role=WorkerRole.DECODE,
            address=address,
            model=model.info,
            codecs=model.codec_specs,
            limits=WorkerLimits(
                model.max_model_len, config.max_running, 0, ready.kv_capacity_tokens, overcommit=config.overcommit
            ),
            device=DeviceInfo(
                vendor=_VENDORS[config.device],
                name=ready.device,
                memory_bytes=ready.device_bytes,
                price_per_hour=config.price_per_hour,
            ),
            http_address=http_address,
            rope_pairings=tuple(KvRopePairing(pairing) for pairing in model.acceptance.rope_pairings),
            kv=KvSupport.from_proto(model.support),
        )


def _kv_capacity(config: DecodeConfig, model: ServedModel) -> int:
    """Unquantised tokens of KV to make room for, on a machine that holds them; 0: the device's engine decides.

    Raises:
        HmaError: The model does not fit this machine.
    """
    if config.device != "cpu":
        return config.kv_capacity_tokens or 0
    capacity = config.capacity_tokens(model.config, model.max_model_len)
    plan = config.memory_plan(model.config, capacity * model.config.kv_elements_per_token * DTYPE_BYTES[config.dtype])
    _log.info("memory: %s", plan)
    plan.check("choose a smaller model or lower --kv-capacity-tokens")
    return capacity


async def _first_end(engine: asyncio.Task[HmaError], receivers: asyncio.Task[HmaError]) -> HmaError:
    """Why the worker must leave; the engine's reason before a receiver's, which follows from it."""
    await asyncio.wait((engine, receivers), return_when=asyncio.FIRST_COMPLETED)
    return engine.result() if engine.done() else receivers.result()


def _show_load(metrics: DecodeMetrics, load: Load) -> None:
    """Lets the gauges read the load when they are scraped."""
    for running in (metrics.running, metrics.vllm_running):
        running.set_function(lambda: load.engine.running)
    for waiting in (metrics.waiting, metrics.vllm_waiting):
        waiting.set_function(lambda: load.engine.waiting)
    metrics.vllm_kv_usage.set_function(lambda: load.engine.kv_used_tokens / load.kv_capacity_tokens)
    metrics.kv_used_tokens.set_function(lambda: load.engine.kv_used_tokens)
    metrics.kv_capacity_tokens.set(load.kv_capacity_tokens)
    metrics.step_seconds.set_function(lambda: load.engine.step_seconds)
    metrics.steps.set_function(lambda: load.engine.steps)
    metrics.preemptions.set_function(lambda: load.engine.preemptions)


if __name__ == "__main__":
    sys.exit(main())
