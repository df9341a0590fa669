"""`POST /v1/completions`.

The status line is sent only when the first token is there: until then a failure still gets its right status. Afterwards
it is told inside the stream, as OpenAI does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from hma_serve.core.errors import HmaError, Internal
from hma_serve.router.completion import Completions, Delta, Event, Finished
from hma_serve.router.http.answers import Answer
from hma_serve.router.http.completion_body import CompletionBody, read_completion_body
from hma_serve.router.http.openai_errors import error_of, json_response
from hma_serve.router.http.requests import read_json_body, request_id_of, slo_of
from hma_serve.router.http.strict_json import dumps

_DONE = b"data: [DONE]\n\n"


class CompletionsEndpoint:
    """The handler.

    Args:
        completions: The pipeline.
        max_body_bytes: Largest body that is read.
        body_timeout: Seconds in which a client must have sent its body.
    """

    def __init__(self, completions: Completions, *, max_body_bytes: int, body_timeout: float) -> None:
        self._completions = completions
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handles one request; raises HmaError while a status can still be sent."""
        fields = await read_json_body(request, limit=self._max_body_bytes, timeout=self._body_timeout)
        body = read_completion_body(fields, slo=slo_of(request.headers), client_request_id=request_id_of(request))
        prepared = await self._completions.prepare(body.request)
        answer = Answer(prepared, body, self._completions.model.tokenizer, int(time.time()))
        async with aclosing(self._completions.run(prepared)) as events:
            if body.stream:
                return await self._stream(request, body, answer, events)
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
        self, request: web.Request, body: CompletionBody, answer: Answer, events: AsyncGenerator[Event, None]
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        try:
            async for event in events:
                if not isinstance(event, Delta | Finished):
                    continue
                chunk = answer.delta_chunk(event) if isinstance(event, Delta) else answer.finish_chunk(event)
                if response is None:
                    response = await _open_stream(request)
                    await response.write(b"".join(map(_sse, answer.opening())))
                await response.write(_sse(chunk))
        except HmaError as exc:
            if response is None:
                raise
            await response.write(_sse(error_of(exc)) + _DONE)
            return response
        if response is None:
            raise Internal("the completion ended without an event")
        usage = _sse(answer.usage_chunk()) if body.include_usage else b""
        await response.write(usage + _DONE)
        await response.write_eof()
        return response


async def _open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )
    await response.prepare(request)
    return response


def _sse(chunk: object) -> bytes:
    return b"data: " + dumps(chunk) + b"\n\n"
