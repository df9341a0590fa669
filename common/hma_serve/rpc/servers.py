"""A gRPC server with health, reflection, bounded messages and typed errors, as a lifetime object."""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from hma_serve.core.errors import FailedPrecondition
from hma_serve.rpc.channels import COMMON_OPTIONS
from hma_serve.rpc.errors import ErrorInterceptor
from hma_serve.rpc.tls import TlsConfig

_SERVER_OPTIONS = [
    *COMMON_OPTIONS,
    # A second service on the same port must fail loudly instead of taking half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
]


class GrpcServer:
    """One listening gRPC server.

    Add servicers to `server`, then `start`. `set_serving(False)` when draining starts, `stop` at the end: long streams
    must have been told to end before, because gRPC's own grace only waits.

    Args:
        role: Names the service in errors.
        listen: `host:port`; port 0 takes a free one.
        services: Full names of the services, for reflection and health.
    """

    def __init__(self, role: str, listen: str, services: Sequence[str], *, tls: TlsConfig | None = None) -> None:
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor(role)], options=_SERVER_OPTIONS)
        self._listen = listen
        self._services = tuple(services)
        self._tls = tls
        self._health = health_aio.HealthServicer()

    async def start(self) -> str:
        """Listens; returns the bound `host:port`.

        Raises:
            FailedPrecondition: The address cannot be bound.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self.server)
        try:
            if self._tls is None:
                port = self.server.add_insecure_port(self._listen)
            else:
                port = self.server.add_secure_port(self._listen, self._tls.server_credentials())
        except RuntimeError as exc:
            raise FailedPrecondition(
                f"cannot listen on {self._listen}: the port is taken or the address is not ours; "
                "choose another with --listen or --grpc-port",
                field="--listen",
            ) from exc
        await self.server.start()
        await self.set_serving(True)
        return f"{self._listen.rpartition(':')[0]}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the server and of each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """Takes no new calls, waits `grace` seconds for running ones, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)
