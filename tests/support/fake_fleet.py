"""Two fake prefill and two fake decode workers under a real router's pipeline, and requests to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hma_serve.core.request import StopConditions
from hma_serve.router.completion import CompletionRequest, Delta, Event
from hma_serve.router.pipeline import Pipeline
from support.fake_workers import FakeDecode, FakePrefill, FakeWorker, running_pipeline

LONG = tuple(range(100))
SHORT = (1, 2, 3)
TOKENS = 5


def request(prompt: tuple[int, ...] = LONG, *, max_tokens: int = TOKENS, timeout: float = 20) -> CompletionRequest:
    return CompletionRequest((prompt,), stop=StopConditions(max_tokens=max_tokens), timeout=timeout)


async def tokens(pipeline: Pipeline, wanted: CompletionRequest) -> list[int]:
    prepared = await pipeline.completions.prepare(wanted)
    return [token async for event in pipeline.completions.run(prepared) for token in token_ids(event)]


def token_ids(event: Event) -> tuple[int, ...]:
    return event.token_ids if isinstance(event, Delta) else ()


def idle(pipeline: Pipeline) -> bool:
    """Nothing is held, queued or running any more."""
    fleet = pipeline.keeper.fleet
    held = sum(view.ours.requests for view in (*fleet.prefills, *fleet.decodes))
    return held == pipeline.admission.waiting == pipeline.completions.running == 0


class Fleet:
    """Two prefill and two decode workers; the first of each is the one that is chosen first."""

    def __init__(self) -> None:
        self.prefills = sorted((FakePrefill(), FakePrefill()), key=lambda worker: worker.info.instance)
        self.decodes = sorted((FakeDecode(), FakeDecode()), key=lambda worker: worker.info.instance)

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (*self.prefills, *self.decodes)

    async def until_idle(self) -> None:
        for worker in self.workers:
            await worker.until_idle()

    def calls(self) -> list[int]:
        return [len(worker.calls) for worker in self.workers]


@asynccontextmanager
async def running_fleet() -> AsyncIterator[tuple[Fleet, Pipeline]]:
    fleet = Fleet()
    async with running_pipeline(*fleet.workers) as (pipeline, _):
        yield fleet, pipeline
        await fleet.until_idle()
        assert idle(pipeline)
