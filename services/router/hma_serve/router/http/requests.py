"""What every endpoint reads from a request beside its own fields: the body's bytes, the ids, the objectives."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from hma_serve.core.errors import DeadlineExceeded, HmaError, InvalidArgument, PayloadTooLarge
from hma_serve.core.request import MIN_OBJECTIVE_SECONDS, Slo
from hma_serve.router.http.openai_errors import HTTP_STATUSES
from hma_serve.router.http.strict_json import loads_object

REQUEST_ID = "X-Request-Id"

_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}", re.ASCII)
_KEY = web.RequestKey("request_id", str)


class UnsupportedMediaType(HmaError):
    """The body is not what this server reads."""

    code = "unsupported_media_type"
    grpc_status = "INVALID_ARGUMENT"
    http_status = HTTP_STATUSES[code]


class BodyTimeout(DeadlineExceeded):
    """The client was too slow in sending its body."""

    http_status = 408


def request_id_of(request: web.Request) -> str:
    """The client's id if it is a plain one, else one minted at the first call; every response carries it."""
    if _KEY not in request:
        given = request.headers.get(REQUEST_ID, "")
        request[_KEY] = given if _ID.fullmatch(given) else secrets.token_hex(16)
    return request[_KEY]


async def read_json_body(request: web.Request, *, limit: int, timeout: float) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        request: With a body.
        limit: Largest body in bytes; checked before it is read, and by aiohttp while it is (`client_max_size`).
        timeout: Seconds in which it must have come.

    Raises:
        HmaError: It is of another type, too large, too slow, or no JSON object.
    """
    if request.content_type != "application/json":
        raise UnsupportedMediaType("send the body as JSON, with Content-Type: application/json")
    encodings = (
        request.headers.get("Content-Encoding", "identity"),
        request.headers.get("Transfer-Encoding", "chunked"),
    )
    if tuple(map(str.lower, encodings)) != ("identity", "chunked"):
        raise UnsupportedMediaType("compressed bodies are not accepted")
    if request.content_length is not None and request.content_length > limit:
        size = request.content_length
        raise PayloadTooLarge(f"the body has {size} bytes; the router's --max-body-bytes accepts {limit}")
    try:
        async with asyncio.timeout(timeout):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise PayloadTooLarge(f"the body has more bytes than the {limit} that --max-body-bytes accepts") from None
    except web.RequestPayloadError as exc:
        raise InvalidArgument("the body is not framed as its headers say") from exc
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout:g} s") from None
    return loads_object(body)


def slo_of(headers: Mapping[str, str]) -> Slo:
    """Objectives from `x-hma-slo-ttft-ms` and `x-hma-slo-tpot-ms`, or llm-d's names; raises InvalidArgument."""
    return Slo(ttft=_milliseconds(headers, "ttft"), tpot=_milliseconds(headers, "tpot"))


def _milliseconds(headers: Mapping[str, str], kind: str) -> float | None:
    for vendor in ("hma", "llm-d"):
        name = f"x-{vendor}-slo-{kind}-ms"
        if name in headers:
            return _seconds(headers[name], name)
    return None


def _seconds(milliseconds: str, name: str) -> float:
    try:
        seconds = float(milliseconds) / 1000
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= MIN_OBJECTIVE_SECONDS):
        least = MIN_OBJECTIVE_SECONDS * 1000
        raise InvalidArgument(f"{name} must be a number of milliseconds, {least:g} or more", field=name)
    return seconds
