"""Typed errors as OpenAI's error object, and whatever else can go wrong in a handler as one of them."""

from __future__ import annotations

import math
from typing import Any

from aiohttp import web

from hma_serve.core.errors import HmaError
from hma_serve.router.http.strict_json import dumps

HTTP_STATUSES = {
    "bad_request": 400,
    "model_not_found": 404,
    "unknown_url": 404,
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
    "expectation_failed": 417,
    "headers_too_large": 431,
}
"""The codes that HTTP alone has, beside those of `hma_serve.core.errors`, with their statuses."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_object(status: int, message: str, *, code: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    default = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": _TYPES.get(status, default), "param": param, "code": code}}


def error_of(error: HmaError) -> dict[str, Any]:
    """The error object of a typed error."""
    code = "model_not_found" if error.code == "not_found" and error.field == "model" else error.code
    return error_object(error.http_status, error.message, param=error.field or None, code=code)


def error_response(error: HmaError) -> web.Response:
    """The whole response, with `Retry-After` (whole seconds, at least one) when a retry makes sense."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return json_response(error_of(error), status=error.http_status, headers=headers)


def http_refusal(code: str, message: str) -> web.Response:
    """The response to what is wrong with HTTP itself; `code` is one of `HTTP_STATUSES`."""
    status = HTTP_STATUSES[code]
    return json_response(error_object(status, message, code=code), status=status)


def http_error_response(error: web.HTTPException) -> web.Response:
    """What aiohttp itself refuses: no such path, wrong method, an odd expectation."""
    codes = {404: "unknown_url", 405: "method_not_allowed", 417: "expectation_failed"}
    messages = {
        404: "there is nothing at this path; see /v1/models, /v1/completions, /v1/chat/completions",
        405: "this path does not take this method",
        417: "the only expectation that can be met is 100-continue",
    }
    message = messages.get(error.status, error.reason)
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return json_response(
        error_object(error.status, message, code=codes.get(error.status, "bad_request")),
        status=error.status,
        headers=headers,
    )


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A response of strict JSON."""
    return web.Response(body=dumps(body), status=status, headers=headers, content_type="application/json")
