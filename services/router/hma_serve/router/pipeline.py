"""The router's parts put together, without sockets of its own: what `main` serves and what tests drive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from hma_serve.core.worker import WorkerRole
from hma_serve.router.admission import Admission
from hma_serve.router.completion import Completions
from hma_serve.router.config import RouterConfig
from hma_serve.router.dispatch import Dispatcher
from hma_serve.router.fleet_keeper import FleetKeeper, SnapshotSource
from hma_serve.router.model import ServedModel
from hma_serve.router.placement import place
from hma_serve.router.readiness import Readiness
from hma_serve.router.tenant import TenantHeader
from hma_serve.rpc import ChannelCache
from hma_serve.telemetry.metrics import RouterMetrics
from hma_serve.text import TokenizingPool


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A running pipeline.

    Attributes:
        completions: Serves requests.
        keeper: The fleet.
        admission: The queue.
        readiness: Judges the fleet.
        metrics: What is counted.
    """

    completions: Completions
    keeper: FleetKeeper
    admission: Admission
    readiness: Readiness
    metrics: RouterMetrics

    def not_ready(self) -> str | None:
        """Why requests cannot be served; None when they can."""
        if self.completions.draining:
            return "shutting down"
        return self.readiness.why_not(self.keeper.fleet, asyncio.get_running_loop().time())


@asynccontextmanager
async def run_pipeline(
    config: RouterConfig, model: ServedModel, snapshots: SnapshotSource, metrics: RouterMetrics
) -> AsyncIterator[Pipeline]:
    """Starts the parts in order and takes them down in reverse; channels are closed last."""
    channels = ChannelCache(limit=config.max_channels, tls=config.tls())
    tokenizing = TokenizingPool(model.tokenizer, model.chat_template)
    try:
        async with FleetKeeper(snapshots, channels, model.served_by) as keeper:
            admission = Admission(
                keeper,
                policy=partial(place, local_prefill=config.local_prefill, local_tokens=config.local_prefill_tokens),
                max_waiting=config.max_waiting,
                max_wait=config.max_wait,
            )
            dispatcher = Dispatcher(admission, keeper, channels, metrics, max_attempts=config.max_attempts)
            completions = Completions(
                model,
                tokenizing,
                dispatcher,
                lambda: keeper.fleet,
                metrics,
                request_timeout=config.request_timeout,
                slo=config.slo,
                tenants=TenantHeader(config.tenant_header.lower()),
            )
            _watch_gauges(metrics, keeper, admission, completions)
            yield Pipeline(completions, keeper, admission, Readiness(local_prefill=config.local_prefill), metrics)
            admission.close()
    finally:
        tokenizing.close()
        await channels.close()


def _watch_gauges(metrics: RouterMetrics, keeper: FleetKeeper, admission: Admission, completions: Completions) -> None:
    """Gauges read the parts when they are scraped; nothing is counted twice."""
    for running in (metrics.running, metrics.vllm_running):
        running.set_function(lambda: completions.running)
    for waiting in (metrics.waiting, metrics.vllm_waiting):
        waiting.set_function(lambda: admission.waiting)

    def count(role: WorkerRole, *, is_open: bool) -> int:
        views = keeper.fleet.prefills if role is WorkerRole.PREFILL else keeper.fleet.decodes
        return sum(view.open is is_open for view in views)

    for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
        metrics.workers.labels(role, "open").set_function(partial(count, role, is_open=True))
        metrics.workers.labels(role, "closed").set_function(partial(count, role, is_open=False))
