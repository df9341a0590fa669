"""Each worker's own HTTP port: `/live`, `/ready` and `/metrics`.

Live means that the event loop turns; it depends on no other process. Ready means that requests can be routed here.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from hma_serve.core.errors import FailedPrecondition
from hma_serve.telemetry.metrics import REGISTRY

_SHUTDOWN_SECONDS = 1.0

NotReady = Callable[[], str | None]
"""Why the service is not ready; None when it is."""


def add_status_routes(app: web.Application, not_ready: NotReady) -> None:
    """Adds the three routes to an application."""

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(_: web.Request) -> web.Response:
        reason = not_ready()
        if reason is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    app.router.add_get("/live", live)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)


async def serve_app(app: web.Application, listen: str) -> tuple[web.AppRunner, str]:
    """Serves an application on `host:port`; port 0 takes a free one.

    Returns:
        The runner, whose `cleanup` ends it, and the bound `host:port`.

    Raises:
        FailedPrecondition: The address cannot be bound.
    """
    host, _, port = listen.rpartition(":")
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        # A client that goes away cancels its handler: nothing is computed for nobody.
        handler_cancellation=True,
        # Services drain before they clean up; what is left then has had its time.
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    await runner.setup()
    site = web.TCPSite(runner, host.strip("[]") or None, int(port), reuse_address=True, reuse_port=False)
    try:
        await site.start()
    except OSError as exc:
        await runner.cleanup()
        raise FailedPrecondition(
            f"cannot listen on {listen}: {exc.strerror or exc}; choose another with --http-listen or --http-port",
            field="--http-listen",
        ) from exc
    return runner, f"{host}:{runner.addresses[0][1]}"


class StatusServer:
    """The HTTP port of a worker.

    Args:
        listen: `host:port`; port 0 takes a free one.
        not_ready: Asked at each `/ready`.
    """

    def __init__(self, listen: str, not_ready: NotReady) -> None:
        self._listen = listen
        self._app = web.Application()
        add_status_routes(self._app, not_ready)
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listens; returns the bound `host:port`. Raises FailedPrecondition when the port is taken."""
        self._runner, bound = await serve_app(self._app, self._listen)
        return bound

    async def stop(self) -> None:
        """Stops listening; idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
