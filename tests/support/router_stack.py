"""A router's HTTP API over fake workers: real sockets, no model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from hma_serve.core.errors import ERRORS
from hma_serve.router.http.app import build_app
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.http.openai_errors import HTTP_STATUSES
from hma_serve.router.pipeline import Pipeline
from support.fake_workers import FakeDecode, FakePrefill, FakeRegistry, running_pipeline

Client: TypeAlias = TestClient[web.Request, web.Application]

MAX_BODY = 128 << 10
JSON = {"Content-Type": "application/json"}


class Stack:
    """A router over one fake prefill and one fake decode."""

    def __init__(
        self, client: Client, pipeline: Pipeline, registry: FakeRegistry, prefill: FakePrefill, decode: FakeDecode
    ) -> None:
        self.client = client
        self.pipeline = pipeline
        self.registry = registry
        self.prefill = prefill
        self.decode = decode

    def text(self, ids: list[int]) -> str:
        return self.pipeline.completions.model.tokenizer.decode(ids)

    async def complete(self, **body: Any) -> dict[str, Any]:
        return await self._whole("/v1/completions", body)

    async def stream(self, **body: Any) -> list[Any]:
        return await self._chunks("/v1/completions", body)

    async def chat(self, **body: Any) -> dict[str, Any]:
        return await self._whole("/v1/chat/completions", body)

    async def chat_stream(self, **body: Any) -> list[Any]:
        return await self._chunks("/v1/chat/completions", body)

    async def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer

    async def _chunks(self, path: str, body: dict[str, Any]) -> list[Any]:
        response = await self.client.post(path, json=body | {"stream": True})
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@asynccontextmanager
async def running_stack(**settings: Any) -> AsyncIterator[Stack]:
    prefill, decode = FakePrefill(), FakeDecode()
    async with running_pipeline(prefill, decode, **settings) as (pipeline, registry):
        app = build_app(pipeline.completions, pipeline.not_ready, HttpLimits(max_body_bytes=MAX_BODY, body_timeout=0.2))
        async with TestClient(TestServer(app)) as client:
            yield Stack(client, pipeline, registry, prefill, decode)


async def assert_error(
    response: ClientResponse, status: int, code: str, param: str | None, *, retry: bool = False
) -> None:
    assert response.status == status, await response.text()
    assert response.content_type == "application/json"
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert code in ERRORS | HTTP_STATUSES, "docs/errors.md does not list it"
    assert error["message"]
    assert response.headers["X-Request-Id"]
    assert ("Retry-After" in response.headers) == retry
