"""The HTTP application: routes, and the one place where whatever happens becomes a response."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from hma_serve.core.errors import HmaError, Internal
from hma_serve.router.completion import Completions
from hma_serve.router.http.chat_answer import ChatAnswer
from hma_serve.router.http.chat_body import read_chat_body
from hma_serve.router.http.completion_answer import CompletionAnswer
from hma_serve.router.http.completion_body import read_completion_body
from hma_serve.router.http.generation_endpoint import GenerationEndpoint
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.openai_errors import error_response, http_error_response, json_response
from hma_serve.router.http.requests import REQUEST_ID, request_id_of
from hma_serve.telemetry.http import NotReady, add_status_routes

_log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(completions: Completions, not_ready: NotReady, limits: HttpLimits) -> web.Application:
    """The application.

    Args:
        completions: The pipeline.
        not_ready: Why requests cannot be served; None when they can.
        limits: What a client may cost.
    """
    app = web.Application(middlewares=[_answer_everything], client_max_size=limits.max_body_bytes)
    app.on_response_prepare.append(_add_headers)
    add_status_routes(app, not_ready)
    app.router.add_get("/health", _health)
    models = _Models(completions)
    app.router.add_get("/v1/models", models.list)
    # Names may have slashes, as those of the Hub do.
    app.router.add_get("/v1/models/{model:.+}", models.one)
    text = GenerationEndpoint(completions, read_completion_body, CompletionAnswer, limits)
    chat = GenerationEndpoint(completions, read_chat_body, ChatAnswer, limits)
    app.router.add_post("/v1/completions", text.post)
    app.router.add_post("/v1/chat/completions", chat.post)
    return app


@web.middleware
async def _answer_everything(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every failure leaves as OpenAI's error object."""
    try:
        return await handler(request)
    except HmaError as exc:
        return error_response(exc)
    except web.HTTPException as exc:
        return http_error_response(exc)
    except ConnectionError:
        # The client went away while it was written to; nobody reads what is returned here.
        return web.Response(status=499)
    except Exception:
        _log.exception("request failed", extra={"request": request_id_of(request), "path": request.path})
        return error_response(Internal("internal error; the log of the router says more"))


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[REQUEST_ID] = request_id_of(request)
    # aiohttp would name itself and Python, versions and all.
    response.headers["Server"] = "hma-serve"


async def _health(_: web.Request) -> web.Response:
    """The process answers; whether it can serve is `/ready`'s question."""
    return json_response({"status": "ok"})


class _Models:
    """`/v1/models` and `/v1/models/{model}`; the model has as many names as its workers gave it."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    async def list(self, _: web.Request) -> web.Response:
        entries = [self._entry(name) for name in self._completions.names()]
        return json_response({"object": "list", "data": entries})

    async def one(self, request: web.Request) -> web.Response:
        return json_response(self._entry(self._completions.model_name(request.match_info["model"])))

    def _entry(self, name: str) -> dict[str, Any]:
        served = self._completions.model
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "hma-serve",
            "root": served.name,
            "max_model_len": self._completions.window,
        }
