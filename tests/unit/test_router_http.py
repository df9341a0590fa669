"""The OpenAI API over fake workers: real HTTP, real gRPC, no model."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from hma_serve.core.errors import Unavailable
from hma_serve.router.config import RouterConfig
from hma_serve.router.http.app import build_app
from hma_serve.router.pipeline import Pipeline, run_pipeline
from hma_serve.telemetry.metrics import router_metrics
from support.fake_workers import MODEL_NAME, VOCAB, WINDOW, FakeDecode, FakePrefill, FakeRegistry, fake_model, running

Client = TestClient[web.Request, web.Application]

MAX_BODY = 64 << 10
LONG = "It was a dark and stormy night, and the rain fell in torrents. "


class Stack:
    """A router over one fake prefill and one fake decode."""

    def __init__(self, client: Client, pipeline: Pipeline, prefill: FakePrefill, decode: FakeDecode) -> None:
        self.client = client
        self.pipeline = pipeline
        self.prefill = prefill
        self.decode = decode

    async def complete(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/completions", json=body)
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer

    async def stream(self, **body: Any) -> list[Any]:
        response = await self.client.post("/v1/completions", json=body | {"stream": True})
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def until_ready(pipeline: Pipeline) -> None:
    changed = asyncio.Event()
    unsubscribe = pipeline.keeper.subscribe(changed.set)
    while pipeline.not_ready() is not None:
        await changed.wait()
        changed.clear()
    unsubscribe()


@asynccontextmanager
async def running_stack(**settings: Any) -> AsyncIterator[Stack]:
    prefill, decode = FakePrefill(), FakeDecode()
    config = RouterConfig(registry="-", **settings)
    async with running(prefill, decode):
        registry = FakeRegistry(prefill.info, decode.info)
        async with run_pipeline(config, fake_model(), registry, router_metrics(CollectorRegistry())) as pipeline:
            await until_ready(pipeline)
            app = build_app(pipeline.completions, pipeline.not_ready, max_body_bytes=MAX_BODY, body_timeout=0.2)
            async with TestServer(app) as server, TestClient(server) as client:
                yield Stack(client, pipeline, prefill, decode)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running_stack() as found:
        yield found


async def test_a_long_prompt_goes_through_both_workers(stack: Stack) -> None:
    answer = await stack.complete(prompt=LONG, max_tokens=len(LONG), model=MODEL_NAME)
    [choice] = answer["choices"]
    assert choice["text"] == LONG
