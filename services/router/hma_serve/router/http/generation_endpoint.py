"""`POST /v1/completions` and `POST /v1/chat/completions`: the same way, in two shapes.

The status line is sent only when the first token is there: until then a failure still gets its right status. Afterwards
it is told inside the stream, as OpenAI does.

A client that stops reading would hold a handler and, by back-pressure, its workers: it has bounded time for each piece.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from aiohttp import web

from hma_serve.core.errors import HmaError, Internal
from hma_serve.router.completion import Completions, Delta, Event, Finished
from hma_serve.router.http.answers import Answer
from hma_serve.router.http.generation_body import Caller, GenerationBody
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.openai_errors import error_of, json_response
from hma_serve.router.http.requests import read_json_body, request_id_of, slo_of
from hma_serve.router.http.sent_names import sent_name
from hma_serve.router.http.strict_json import dumps
from hma_serve.telemetry.spans import REQUEST
from hma_serve.telemetry.tracing import Attribute, Span, SpanKind, Trace

_DONE = b"data: [DONE]\n\n"


class GenerationEndpoint:
    """The handler.

    Args:
        completions: The pipeline.
        read: Reads a body.
        answer: The shape of the answer.
        limits: What a client may cost.
    """

    def __init__(
        self,
        completions: Completions,
        read: Callable[[Mapping[str, Any], Caller], GenerationBody],
        answer: type[Answer],
        limits: HttpLimits,
    ) -> None:
        self._completions = completions
        self._read = read
        self._answer = answer
        self._limits = limits

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handles one request; raises HmaError while a status can still be sent."""
        attributes: dict[str, Attribute] = {"http.request.method": request.method, "http.route": request.path}
        with Trace.of_headers(request.headers).span(REQUEST, kind=SpanKind.SERVER, **attributes) as span:
            return await self._post(request, span)

    async def _post(self, request: web.Request, span: Span) -> web.StreamResponse:
        limits = self._limits
        with self._completions.counting_refused():
            caller = Caller(request_id_of(request), slo_of(request.headers))
            sent = await read_json_body(request, limit=limits.max_body_bytes, timeout=limits.body_timeout)
        try:
            return await self._answer_to(request, sent, caller, span)
        except HmaError as exc:
            exc.field = sent_name(exc.field, sent)
            raise

    async def _answer_to(
        self, request: web.Request, sent: Mapping[str, Any], caller: Caller, span: Span
    ) -> web.StreamResponse:
        with self._completions.counting_refused():
            body = self._read(sent, caller)
            tenant = self._completions.tenants.read(request.headers.get)
        prepared = await self._completions.prepare(replace(body.request, trace=span.trace, tenant=tenant))
        span.set(**prepared.attributes)
        answer = self._answer(prepared, body, self._completions.model.tokenizer, int(time.time()))
        async with aclosing(self._completions.run(prepared)) as events:
            if body.stream:
                return await self._stream(request, sent, answer, events, include_usage=body.include_usage)
            return await self._whole(answer, events)

    async def _whole(self, answer: Answer, events: AsyncGenerator[Event, None]) -> web.Response:
        deltas: list[Delta] = []
        ends: list[Finished] = []
        async for event in events:
            if isinstance(event, Delta):
                deltas.append(event)
            elif isinstance(event, Finished):
                ends.append(event)
        return json_response(answer.whole(deltas, ends))

    async def _stream(
        self,
        request: web.Request,
        sent: Mapping[str, Any],
        answer: Answer,
        events: AsyncGenerator[Event, None],
        *,
        include_usage: bool,
    ) -> web.StreamResponse:
        stream: _EventStream | None = None
        try:
            async for event in events:
                if not isinstance(event, Delta | Finished):
                    continue
                chunk = answer.delta_chunk(event) if isinstance(event, Delta) else answer.finish_chunk(event)
                if stream is None:
                    stream = await _EventStream.open(request, self._limits.write_timeout)
                    await stream.write(b"".join(map(_sse, answer.opening())))
                if chunk is not None:
                    await stream.write(_sse(chunk))
        except HmaError as exc:
            if stream is None:
                raise
            exc.field = sent_name(exc.field, sent)
            return await stream.end(_sse(error_of(exc)))
        if stream is None:
            raise Internal("the completion ended without an event")
        return await stream.end(_sse(answer.usage_chunk()) if include_usage else b"")


class _EventStream:
    """Server-sent events to one client."""

    def __init__(self, request: web.Request, response: web.StreamResponse, timeout: float) -> None:
        self._request = request
        self._response = response
        self._timeout = timeout

    @classmethod
    async def open(cls, request: web.Request, timeout: float) -> _EventStream:
        """Sends the status line."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(request)
        return cls(request, response, timeout)

    async def write(self, data: bytes) -> None:
        """Sends; raises ConnectionResetError when the client is gone or does not read."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def end(self, data: bytes) -> web.StreamResponse:
        """Sends the last events."""
        await self.write(data + _DONE)
        await self._response.write_eof()
        return self._response


def _sse(chunk: object) -> bytes:
    return b"data: " + dumps(chunk) + b"\n\n"
