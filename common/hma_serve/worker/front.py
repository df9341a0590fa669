"""A worker's front beside its own RPCs: the status port, the Worker service, the registration and the way out.

The calls are made in the order in which they stand here. So the status port answers before the model is loaded, gRPC
listens before routers hear of the worker, and it is ready only when both are true. Everything is closed by the stack,
last first: the registration goes before the server that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from hma_serve.core.errors import FailedPrecondition, HmaError
from hma_serve.core.worker import WorkerInfo, WorkerRole, mint_instance
from hma_serve.registry import Session, SessionStatus, open_store
from hma_serve.rpc import GrpcServer
from hma_serve.telemetry.http import StatusServer
from hma_serve.v1 import worker_pb2_grpc
from hma_serve.worker.drain import Drain, DrainResult
from hma_serve.worker.load import WatchedLoad
from hma_serve.worker.place import PlaceConfig, etcd_tls, status_address
from hma_serve.worker.servicer import WorkerServicer

_STOP_SECONDS = 2.0


class WorkerFront:
    """One run of a worker, as the rest of the fleet sees it.

    Args:
        role: Of the worker.
        config: Where it listens and registers.
        load: Its gauges.
        stack: Closes what is opened here.
        starting: What `/ready` says until the worker is registered.
        show_registered: Told whether routers can find the worker, at each change.

    Attributes:
        instance: This process's name in the registry, new in each run.
    """

    def __init__(
        self,
        role: WorkerRole,
        config: PlaceConfig,
        load: WatchedLoad,
        stack: contextlib.AsyncExitStack,
        *,
        starting: str,
        show_registered: Callable[[bool], None],
    ) -> None:
        self.instance = mint_instance(role)
        self._role = role
        self._config = config
        self._load = load
        self._stack = stack
        self._starting = starting
        self._show_registered = show_registered
        self._drain: Drain | None = None
        self._session: Session | None = None
        self._known = False

    async def open_status_port(self) -> str:
        """Serves /live, /ready and /metrics; returns the bound `host:port`."""
        status = StatusServer(self._config.http_listen, self.not_ready)
        bound = await status.start()
        self._stack.push_async_callback(status.stop)
        return bound

    async def listen(self, server: GrpcServer, fail_requests: Callable[[HmaError], int]) -> str:
        """Adds the Worker service to a server that has all others, and starts it.

        Args:
            server: Not started; `hma_serve.v1.Worker` is among the names that it was made with.
            fail_requests: Ends every request with an error; returns how many there were.

        Returns:
            The address that others use.

        Raises:
            HmaError: The address cannot be bound, or nobody could connect to it.
        """
        config, load = self._config, self._load
        drain = Drain(
            self._role,
            load,
            fail_requests=fail_requests,
            set_not_serving=partial(server.set_serving, serving=False),
        )
        self._drain = drain
        servicer = WorkerServicer(drain, load, default_grace=config.drain_grace)
        worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server.server)
        bound = await server.start()
        self._stack.push_async_callback(server.stop, _STOP_SECONDS)
        return config.advertised(bound)

    async def register(self, info: WorkerInfo) -> None:
        """Makes the worker known, in the registry if there is one; from now on it is ready."""
        info = replace(info, http_address=status_address(info.http_address, info.address))
        if self._config.etcd is not None:
            self._session = await self._stack.enter_async_context(self._registration(self._config.etcd, info))
        self._listening_drain.registered(info, self._session)
        self._known = True

    async def leave(self) -> DrainResult:
        """Drains: refuses what is new, finishes what runs, then vanishes from the registry."""
        return await self._listening_drain.run(self._config.drain_grace)

    def not_ready(self) -> str | None:
        """Why no requests should be routed here; None when they may be."""
        if not self._known:
            return self._starting
        if self._load.draining:
            return "draining"
        if self._session is not None and not self._session.status.routable:
            return f"not in the registry ({self._session.status.state})"
        return None

    @property
    def _listening_drain(self) -> Drain:
        if self._drain is None:
            raise FailedPrecondition("the worker must listen before it registers or leaves")
        return self._drain

    @contextlib.asynccontextmanager
    async def _registration(self, etcd: str, info: WorkerInfo) -> AsyncIterator[Session]:
        store = open_store(etcd, etcd_tls(self._config.tls(), self._config.etcd_tls_dir))

        def show(status: SessionStatus) -> None:
            self._show_registered(status.routable)

        try:
            async with Session(store, info, ttl=self._config.registry_ttl, on_status=show) as session:
                yield session
        finally:
            await asyncio.to_thread(store.close)
