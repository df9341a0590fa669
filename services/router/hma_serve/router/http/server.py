"""The listening HTTP server: what aiohttp refuses by itself leaves as an error object too, and connections are bounded.

aiohttp answers what its parser cannot read in plain text and logs a traceback for it. Neither is of use: the client
expects OpenAI's error object, and a port scan is no incident. A connection that does not bring a whole request head in
time is closed, however slowly it goes on sending.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from hma_serve.core.errors import FailedPrecondition
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.openai_errors import error_object, http_error_response, http_refusal, json_response
from hma_serve.router.http.requests import REQUEST_ID
from hma_serve.router.http.strict_json import dumps

_log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 1.0
_LINGER_SECONDS = 5.0
_MAX_SHOWN = 200
_TOO_MANY_HEADERS = "Too many headers received"


class HttpServer:
    """Serves an application on one address.

    Args:
        app: What to serve.
        listen: `host:port`; port 0 takes a free one.
        limits: What a client may cost.
    """

    def __init__(self, app: web.Application, listen: str, limits: HttpLimits) -> None:
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            # A client that goes away cancels its handler: nothing is computed for nobody.
            handler_cancellation=True,
            # The router drains before it stops; what is left then has had its time.
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        self._listen = listen
        self._limits = limits
        self._listener: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._runner.server.connections) if self._runner.server is not None else 0

    async def start(self) -> str:
        """Listens; returns the bound `host:port`.

        Raises:
            FailedPrecondition: The address cannot be bound.
        """
        await self._runner.setup()
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        connection = partial(_Connection, self._runner.server, self._limits, loop=loop)
        host, _, port = self._listen.rpartition(":")
        try:
            self._listener = await loop.create_server(connection, host.strip("[]"), int(port), reuse_address=True)
        except OSError as exc:
            await self._runner.cleanup()
            raise FailedPrecondition(
                f"cannot listen on {self._listen}: {exc.strerror or exc}; choose another address with --http-listen "
                "(hma-serve up: --http-port)",
                field="--http-listen",
            ) from exc
        return f"{host}:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stops listening and closes what is still open; idempotent."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()


class _Connection(web.RequestHandler):
    """One connection."""

    __slots__ = ("_limits", "_server")

    def __init__(self, server: web.Server, limits: HttpLimits, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes it so and means none
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=limits.max_headers,
            # Counts from the connection's start, and again from the end of each response.
            keepalive_timeout=limits.idle_timeout,
            lingering_time=_LINGER_SECONDS,
            # Compressed bodies are refused, not inflated.
            auto_decompress=False,
        )
        self._server = server
        self._limits = limits

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Turns the connection away when there are too many."""
        super().connection_made(transport)
        if len(self._server.connections) > self._limits.max_connections:
            assert isinstance(transport, asyncio.Transport)
            transport.write(_TOO_MANY)
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the parser cannot read, as an error object; closes the connection."""
        if isinstance(exc, HttpProcessingError):
            _log.debug("unreadable request: %s", exc)
        else:
            _log.error("request failed outside of its handler", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun; nothing can be said any more")
        response = (
            self._unreadable(exc)
            if status < 500
            else json_response(error_object(500, "internal error", code="internal"), status=500)
        )
        response.headers[REQUEST_ID] = secrets.token_hex(16)
        response.headers["Server"] = "hma-serve"
        response.force_close()
        return response

    def _unreadable(self, exc: BaseException | None) -> web.Response:
        reason = str(getattr(exc, "message", "")).partition("\n")[0].rstrip(":")[:_MAX_SHOWN]
        if isinstance(exc, LineTooLong) or reason == _TOO_MANY_HEADERS:
            limits = self._limits
            text = (
                f"the head is too large: a line may have {limits.max_header_bytes} bytes, and there may be "
                f"{limits.max_headers} headers"
            )
            return http_refusal("headers_too_large", text)
        text = f"this is not a valid HTTP request: {reason}" if reason else "this is not a valid HTTP request"
        return http_refusal("bad_request", text)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends a response; what was refused before any middleware saw it becomes an error object here."""
        if isinstance(resp, web.HTTPException):
            resp = http_error_response(resp)
        return await super().finish_response(request, resp, start_time)


_BUSY = dumps(
    error_object(503, "too many connections (the router's --max-connections); try again later", code="unavailable")
)
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_BUSY)
) + _BUSY
