"""Attempts until one succeeds: placed, run, and run again elsewhere in a way that the client does not notice.

An attempt that fails before the first token is simply made again on another pair. One that fails later is *migrated*:
the next decode worker gets the prompt's KV again (from the cache of the prefill worker that made it, else computed
again with the same profile) and the tokens that the client has, which count against the budget; it goes on behind
them. Random numbers depend on the seed and on the position in the completion alone, so sampled text goes on as well.

At most `max_attempts` pairs may fail a request. A worker that refuses because it is full counts differently: the
request goes back into the queue, in its old place (a migrated one in front), until its time is up. So does one that is
migrated when no worker is left: the next may be starting. Every attempt has
an epoch of its own, so that whatever an older one still sends is refused by the workers.
"""

from __future__ import annotations

import asyncio
import logging
import time
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
from hma_serve.router.admission import Admission, Claim, Held
from hma_serve.router.attempt import Attempt, AttemptFailed, Job
from hma_serve.router.placement import Demand, Placement
from hma_serve.rpc import ChannelCache
from hma_serve.telemetry import spans
from hma_serve.telemetry.metrics import RouterMetrics
from hma_serve.telemetry.tracing import Attribute, SpanKind, Trace
from hma_serve.v1 import common_pb2

_log = logging.getLogger(__name__)

_RETRY_AFTER = 1.0
_LOOK_AGAIN = 0.5
_CLOCK_SLACK = 0.5

CLIENTS_FAULT = (InvalidArgument, PayloadTooLarge)
"""Failures that the request itself is to blame for, on any worker."""


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
        migrations: Times that the completion went on on another decode worker.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    migrations: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The completion is whole.

    Attributes:
        reason: Why it ended.
        stop_token_id: The stop token that ended it, if one did.
        cached_tokens: Prompt tokens whose computation a cache saved.
        migrations: Times that it went on on another decode worker.
    """

    reason: common_pb2.FinishReason.ValueType
    stop_token_id: int | None
    cached_tokens: int
    migrations: int = 0


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
        course = _Course(job)
        while True:
            with job.trace.span(spans.ADMISSION) as waiting:
                held = await self._acquire(course)
                decided = time.monotonic_ns()
                waiting.trace.record(spans.PLACEMENT, decided, decided, **_told(held.placement))
            course.begin(held.placement)
            self._count(course, held.placement)
            attempt = Attempt(course.job, held, course.epoch, self._channels)
            try:
                with job.trace.span(spans.ATTEMPT, kind=SpanKind.CLIENT, **course.attributes) as span:
                    async with aclosing(_progress(attempt, held.placement, span.trace)) as steps:
                        async for step in steps:
                            migrations, seen = course.migrations, course.take(step)
                            self._metrics.migrations.inc(course.migrations - migrations)
                            yield seen
                return
            except AttemptFailed as failed:
                if course.complete:
                    yield course.take(Ended(common_pb2.FINISH_REASON_LENGTH, None, 0))
                    return
                self._learn(failed)
                if course.fail(failed, attempt) >= self._max_attempts or _hopeless(failed, job):
                    raise _final(failed, job) from failed
                self._again(failed, course)
            finally:
                held.release()

    async def _acquire(self, course: _Course) -> Held:
        """Waits for a pair. Where nobody could serve it, a client in mid-sentence waits for a worker to come."""
        while True:
            try:
                return await self._admission.acquire(course.claim())
            except Unavailable:
                if not course.emitted or course.waited + _LOOK_AGAIN >= self._admission.max_wait:
                    raise
            await asyncio.sleep(_LOOK_AGAIN)

    def _count(self, course: _Course, placement: Placement) -> None:
        if course.epoch == 1:
            self._metrics.queue_seconds.observe(asyncio.get_running_loop().time() - course.job.arrived)
            if placement.prefill is None and packed_tokens(len(course.job.prompt)):
                self._metrics.local_prefills.inc()

    def _learn(self, failed: AttemptFailed) -> None:
        if failed.unreachable:
            self._reports.report_failure(failed.instance)
        elif isinstance(failed.error, ResourceExhausted):
            self._reports.report_refusal(failed.instance)

    def _again(self, failed: AttemptFailed, course: _Course) -> None:
        what = "migrating" if course.emitted else "trying another pair"
        _log.info("%s: %s", what, failed, extra={"request": course.job.request_id, "emitted": len(course.emitted)})
        self._metrics.retries.labels(failed.leg).inc()


class _Course:
    """A job over its attempts.

    Args:
        job: As the client asked for it.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._demand = Demand(len(job.prompt), job.max_tokens, slo=job.slo, arrived=job.arrived)
        self._waiting_since = job.arrived
        self._failures = 0
        self._cached_tokens = 0
        self._moved = False
        self._placement: Placement
        self.epoch = 0
        self.migrations = 0
        self.emitted: list[int] = []

    @property
    def job(self) -> Job:
        """What is left to do."""
        return replace(self._job, emitted=tuple(self.emitted)) if self.emitted else self._job

    @property
    def waited(self) -> float:
        """Seconds since it came, or since it lost the worker that it had."""
        return asyncio.get_running_loop().time() - self._waiting_since

    @property
    def complete(self) -> bool:
        """The client has every token that it may get; only the end was not said."""
        return len(self.emitted) >= self._job.max_tokens

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Of the attempt's span."""
        return {"epoch": self.epoch, "emitted_tokens": len(self.emitted), **_pair(self._placement)}

    def claim(self) -> Claim:
        """For admission."""
        job = self._job
        return Claim(
            self._demand,
            arrived=self._waiting_since,
            deadline=job.deadline,
            priority=job.priority,
            tenant=job.tenant,
            resumed=bool(self.emitted),
        )

    def begin(self, placement: Placement) -> None:
        """An attempt begins there."""
        self.epoch += 1
        self._placement = placement

    def take(self, step: Progress) -> Progress:
        """A step of the attempt, as the client is to see it."""
        if isinstance(step, Tokens):
            if not self.emitted:
                # What a cache saves a later attempt, it did not save the client.
                self._cached_tokens = step.cached_tokens
                self._demand = replace(self._demand, profile=self._placement.profile)
            elif self._moved:
                self.migrations += 1
            self._moved = False
            self.emitted += step.token_ids
            return replace(step, cached_tokens=self._cached_tokens, migrations=self.migrations)
        if isinstance(step, Ended):
            cached = self._cached_tokens if self.emitted else step.cached_tokens
            return replace(step, cached_tokens=cached, migrations=self.migrations)
        return step

    def fail(self, failed: AttemptFailed, attempt: Attempt) -> int:
        """An attempt failed; returns how many did, refusals apart."""
        self._failures += not isinstance(failed.error, ResourceExhausted)
        avoid = self._demand.avoid | {failed.instance} | ({failed.witness} if failed.witness is not None else set())
        self._demand = replace(self._demand, avoid=avoid, emitted_tokens=len(self.emitted))
        prefill = self._placement.prefill
        if attempt.started and prefill is not None:
            cached = {**self._demand.cached, prefill.instance: self._placement.packed_tokens}
            self._demand = replace(self._demand, cached=cached)
        if self.emitted and not self._moved:
            # The first token has come, so what counts from here is the pause.
            self._waiting_since = asyncio.get_running_loop().time()
            self._demand = replace(self._demand, arrived=self._waiting_since)
            self._moved = True
        return self._failures


async def _progress(attempt: Attempt, placement: Placement, trace: Trace) -> AsyncGenerator[Progress, None]:
    """The attempt's responses as the router's own events."""
    async with aclosing(attempt.run(trace)) as responses:
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


def _pair(placement: Placement) -> dict[str, Attribute]:
    prefill = placement.prefill
    return {"decode": placement.decode.instance, "prefill": "" if prefill is None else prefill.instance}


def _told(placement: Placement) -> dict[str, Attribute]:
    """A placement and what was expected of it, as attributes."""
    expected = placement.prediction
    return {
        **_pair(placement),
        "packed_tokens": placement.packed_tokens,
        "predicted_ttft_seconds": expected.ttft,
        "predicted_tpot_seconds": expected.tpot,
        "dollars": expected.dollars,
        "measured": expected.measured,
    }


def _hopeless(failed: AttemptFailed, job: Job) -> bool:
    """Whether another pair would say the same, or too late."""
    return isinstance(failed.error, CLIENTS_FAULT) or _out_of_time(failed, job)


def _out_of_time(failed: AttemptFailed, job: Job) -> bool:
    """Whether the request's own time is up; a worker's clock may say so a little earlier than ours."""
    slack = _CLOCK_SLACK if isinstance(failed.error, DeadlineExceeded) else 0.0
    return asyncio.get_running_loop().time() >= job.deadline - slack


def _final(failed: AttemptFailed, job: Job) -> HmaError:
    """What the client is told: its own faults, overload and bugs as they are, anything else as unavailability."""
    if _out_of_time(failed, job):
        return DeadlineExceeded("the request's deadline passed")
    if isinstance(failed.error, (*CLIENTS_FAULT, ResourceExhausted, Internal)):
        return failed.error
    return Unavailable(f"the {failed.leg} worker failed: {failed.error.message}", retry_after=_RETRY_AFTER)
