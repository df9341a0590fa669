"""The router process: starts the parts in order, serves until a signal, drains."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from hma_serve.core.errors import FailedPrecondition, HmaError
from hma_serve.core.worker import WorkerInfo, WorkerLimits, WorkerRole, mint_instance
from hma_serve.registry import Session, Watcher, open_readable_store, open_store
from hma_serve.router.completion import Completions
from hma_serve.router.config import RouterConfig, build_parser, parse_config
from hma_serve.router.grpc_api import SERVICE, InferenceServicer
from hma_serve.router.http.app import build_app
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.server import HttpServer
from hma_serve.router.model import ServedModel, load_model
from hma_serve.router.pipeline import run_pipeline
from hma_serve.rpc import GrpcServer
from hma_serve.telemetry.logs import setup_logging
from hma_serve.telemetry.metrics import router_metrics
from hma_serve.telemetry.tracing import exporting_traces
from hma_serve.v1 import inference_pb2_grpc
from hma_serve.worker import advertised_address, etcd_tls

__all__ = ["build_parser", "main", "run"]

_log = logging.getLogger(__name__)

_STOP_GRACE = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the router; returns the exit status."""
    try:
        config = parse_config(argv)
        setup_logging("router", config.log_format)
        with exporting_traces("router"):
            asyncio.run(run(config))
    except HmaError as exc:
        print(f"hma-serve router: {exc.message}", file=sys.stderr)
        return 1
    return 0


async def run(config: RouterConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    While it drains, new requests are refused, `/ready` says 503 and `/live` 200, and running requests go on. A second
    signal ends them with an error at once.

    Raises:
        HmaError: The router cannot start.
    """
    stop, urgent = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (urgent if stop.is_set() else stop).set())
    model = await asyncio.to_thread(load_model, config.model)
    async with (
        _watching(config) as watcher,
        run_pipeline(config, model, watcher, router_metrics()) as pipeline,
    ):
        grpc_server = GrpcServer("router", config.grpc_listen, [SERVICE], tls=config.tls())
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(pipeline.completions), grpc_server.server)
        limits = HttpLimits(max_body_bytes=config.max_body_bytes, max_connections=config.max_connections)
        app = build_app(pipeline.completions, pipeline.not_ready, limits)
        http_server = HttpServer(app, config.http_listen, limits)
        http_address = await http_server.start()
        try:
            grpc_address = await _start(grpc_server, config.grpc_listen)
            _log.info("serving %s", model.name, extra={"http": http_address, "grpc": grpc_address})
            async with _registered(config, model, grpc_address, http_address):
                await stop.wait()
                _log.info("draining", extra={"running": pipeline.completions.running})
                await grpc_server.set_serving(False)
                await _drain(pipeline.completions, config.drain_grace, urgent)
            await grpc_server.stop(_STOP_GRACE)
        finally:
            await http_server.stop()
    _log.info("stopped")


async def _drain(completions: Completions, grace: float, urgent: asyncio.Event) -> None:
    async def cut() -> None:
        await urgent.wait()
        await completions.drain(0)

    cutting = asyncio.create_task(cut())
    await completions.drain(grace)
    cutting.cancel()


async def _start(server: GrpcServer, listen: str) -> str:
    try:
        return await server.start()
    except FailedPrecondition as exc:
        raise FailedPrecondition(
            f"cannot listen on {listen}: the port is taken or the address is not ours; choose another address with "
            "--grpc-listen (hma-serve up: --grpc-port)",
            field="--grpc-listen",
        ) from exc


@asynccontextmanager
async def _watching(config: RouterConfig) -> AsyncIterator[Watcher]:
    """The registry's watcher; closing it and its store blocks, so threads do that."""
    store = open_readable_store(config.registry, etcd_tls(config.tls(), config.etcd_tls_dir))
    watcher = Watcher(store)
    watcher.start()
    try:
        yield watcher
    finally:
        await watcher.aclose()
        await asyncio.to_thread(store.close)


@asynccontextmanager
async def _registered(
    config: RouterConfig, model: ServedModel, grpc_address: str, http_address: str
) -> AsyncIterator[None]:
    """The router's record, so that clients and operators find it. A registry that is away delays only the record."""
    address = advertised_address(grpc_address, config.advertise)
    if address is None or config.static_registry:
        yield
        return
    host = address.rpartition(":")[0]
    info = WorkerInfo(
        instance=mint_instance(WorkerRole.ROUTER),
        role=WorkerRole.ROUTER,
        address=address,
        model=model.info,
        codecs=(),
        limits=WorkerLimits(model.max_positions, config.max_connections, config.max_waiting),
        http_address=f"{host}:{http_address.rpartition(':')[2]}",
    )
    store = open_store(config.registry, etcd_tls(config.tls(), config.etcd_tls_dir))
    session = Session(store, info, ttl=config.registry_ttl)
    session.start()
    try:
        yield
    finally:
        await session.aclose()
        await asyncio.to_thread(store.close)


if __name__ == "__main__":
    sys.exit(main())
