"""Attempts until one succeeds: placed, run, and run again elsewhere while that is invisible to the client.

Another pair is tried only before the first token, at most `max_attempts` times. A worker that refuses because it is
full counts differently: the request goes back into the queue, in its old place, until its time is up. Every attempt has
an epoch of its own, so that whatever an older one still sends is refused by the workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from hma_serve.core.errors import (
    DeadlineExceeded,
    HmaError,
    Internal,
    InvalidArgument,
    PayloadTooLarge,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.core.groups import packed_tokens
from hma_serve.router.admission import Admission
from hma_serve.router.attempt import Attempt, AttemptFailed, Job
from hma_serve.router.placement import Demand, Placement
from hma_serve.rpc import ChannelCache
from hma_serve.telemetry.metrics import RouterMetrics
from hma_serve.v1 import common_pb2

_log = logging.getLogger(__name__)

_CLIENTS_FAULT = (InvalidArgument, PayloadTooLarge)
_RETRY_AFTER = 1.0
_CLOCK_SLACK = 0.5


@dataclass(frozen=True, slots=True)
class Placed:
    """Decode holds the whole prompt and has begun. A later attempt says it again."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one decode step or several.

    Attributes:
        token_ids: At least one.
        logprobs: As many, if they were asked for.
        cached_tokens: Prompt tokens whose computation a cache saved, as far as is known yet.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The completion is whole.

    Attributes:
        reason: Why it ended.
        stop_token_id: The stop token that ended it, if one did.
        cached_tokens: Prompt tokens whose computation a cache saved.
    """

    reason: common_pb2.FinishReason.ValueType
    stop_token_id: int | None
    cached_tokens: int


Progress = Placed | Tokens | Ended


class WorkerReports(Protocol):
    """Where dispatch tells what it learned about workers."""

    def report_failure(self, instance: str) -> None:
        """The worker could not be reached."""

    def report_refusal(self, instance: str) -> None:
        """The worker says that it is full."""


class Dispatcher:
    """Runs jobs on the fleet.

    Args:
        admission: Where they wait for a pair.
        reports: Told about workers that fail or refuse.
        channels: To reach the workers.
        metrics: The router's.
        max_attempts: Pairs that may fail one request.
    """

    def __init__(
        self,
        admission: Admission,
        reports: WorkerReports,
        channels: ChannelCache,
        metrics: RouterMetrics,
        *,
        max_attempts: int = 3,
    ) -> None:
        self._admission = admission
        self._reports = reports
        self._channels = channels
        self._max_attempts = max_attempts
        self._metrics = metrics

    async def run(self, job: Job) -> AsyncGenerator[Progress, None]:
        """Yields the job's progress; `Ended` is the last. Close it (`contextlib.aclosing`) when leaving early.

        Raises:
            HmaError: It was shed, or every attempt failed.
        """
        demand = Demand(len(job.prompt), job.max_tokens, slo=job.slo)
        failures = epoch = 0
        while True:
            epoch += 1
            held = await self._admission.acquire(
                demand, arrived=job.arrived, deadline=job.deadline, priority=job.priority
            )
            self._count(job, held.placement, epoch)
            sent_tokens = False
            attempt = Attempt(job, held, epoch, self._channels)
            try:
                async with aclosing(_progress(attempt, held.placement)) as steps:
                    async for step in steps:
                        sent_tokens = sent_tokens or isinstance(step, Tokens)
                        yield step
                return
            except AttemptFailed as failed:
                refused = isinstance(failed.error, ResourceExhausted)
                failures += not refused
                self._learn(failed, refused)
                if sent_tokens or failures >= self._max_attempts or _hopeless(failed, job):
                    raise _final(failed, job) from failed
                _log.info("trying another pair: %s", failed, extra={"request": job.request_id})
                self._metrics.retries.labels(failed.leg).inc()
                demand = replace(demand, avoid=demand.avoid | {failed.instance})
            finally:
                held.release()

    def _count(self, job: Job, placement: Placement, epoch: int) -> None:
        if epoch == 1:
            self._metrics.queue_seconds.observe(asyncio.get_running_loop().time() - job.arrived)
            if placement.prefill is None and packed_tokens(len(job.prompt)):
                self._metrics.local_prefills.inc()

    def _learn(self, failed: AttemptFailed, refused: bool) -> None:
        if failed.unreachable:
            self._reports.report_failure(failed.instance)
        elif refused:
            self._reports.report_refusal(failed.instance)


async def _progress(attempt: Attempt, placement: Placement) -> AsyncGenerator[Progress, None]:
    """The attempt's responses as the router's own events."""
    async with aclosing(attempt.run()) as responses:
        async for response in responses:
            match response.WhichOneof("event"):
                case "tokens":
                    tokens = response.tokens
                    yield Tokens(tuple(tokens.token_ids), tuple(tokens.logprobs), attempt.cached_tokens)
                case "started":
                    yield Placed(placement)
                case "finished":
                    finished = response.finished
                    stop_token = finished.stop_token_id if finished.HasField("stop_token_id") else None
                    cached = max(finished.usage.cached_tokens, attempt.cached_tokens)
                    yield Ended(finished.reason, stop_token, cached)


def _hopeless(failed: AttemptFailed, job: Job) -> bool:
    """Whether another pair would say the same, or too late."""
    return isinstance(failed.error, _CLIENTS_FAULT) or _out_of_time(failed, job)


def _out_of_time(failed: AttemptFailed, job: Job) -> bool:
    """Whether the request's own time is up; a worker's clock may say so a little earlier than ours."""
    slack = _CLOCK_SLACK if isinstance(failed.error, DeadlineExceeded) else 0.0
    return asyncio.get_running_loop().time() >= job.deadline - slack


def _final(failed: AttemptFailed, job: Job) -> HmaError:
    """What the client is told: its own faults, overload and bugs as they are, anything else as unavailability."""
    if _out_of_time(failed, job):
        return DeadlineExceeded("the request's deadline passed")
    if isinstance(failed.error, (*_CLIENTS_FAULT, ResourceExhausted, Internal)):
        return failed.error
    return Unavailable(f"the {failed.leg} worker failed: {failed.error.message}", retry_after=_RETRY_AFTER)
