"""The way of a request through the router, the same for HTTP and gRPC.

Validate, tokenize, queue, dispatch, detokenize, look for stop strings. Everything that can be wrong with a request is
found by `prepare`, before anything is promised to the client; the limits that need the model or the fleet stand here
and nowhere else (those of single numbers stand in `core.request`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hma_serve.core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    HmaError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.core.request import MAX_SEED, SamplingParams, Slo, StopConditions
from hma_serve.router.admission import Shed
from hma_serve.router.attempt import Job
from hma_serve.router.conversation import with_roles_of
from hma_serve.router.dispatch import CLIENTS_FAULT, Dispatcher, Ended, Placed, Tokens
from hma_serve.router.fleet import Fleet
from hma_serve.router.generated_text import GeneratedText
from hma_serve.router.merge import merge
from hma_serve.router.model import ServedModel
from hma_serve.router.pace import Pace
from hma_serve.router.tenant import TenantHeader
from hma_serve.telemetry.metrics import RouterMetrics
from hma_serve.telemetry.spans import TOKENIZE
from hma_serve.telemetry.tracing import Attribute, Trace
from hma_serve.text import Conversation, TokenizingPool
from hma_serve.v1 import common_pb2

_log = logging.getLogger(__name__)

_CUT_SECONDS = 2.0
# A call's deadline may be seen a little earlier than by our clock.
_CLOCK_SLACK = 0.05

MAX_COMPLETIONS = 32
"""Completions that one request may ask for: prompts times `n`."""

Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a client asks for, before it is compared with the model and the fleet.

    Attributes:
        prompts: Texts, token ids or conversations; at least one.
        model: Name of the model; empty: the one there is.
        sampling: How tokens are drawn.
        stop: When completions end.
        default_max_tokens: Length when `stop.max_tokens` is absent, cut to the window; None: the whole window.
        n: Completions of each prompt.
        slo: Objectives.
        priority: Higher goes first.
        tenant: Whose it is, from an identity that somebody has checked; room is shared fairly between tenants.
        client_request_id: For logs and traces only.
        timeout: Seconds the client is willing to wait; None: the router's limit.
        trace: The request's place in its trace.
    """

    prompts: tuple[Prompt, ...]
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopConditions = field(default_factory=StopConditions)
    default_max_tokens: int | None = None
    n: int = 1
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    tenant: str = ""
    client_request_id: str = ""
    timeout: float | None = None
    trace: Trace = field(default_factory=Trace)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be run.

    Attributes:
        request_id: Minted here; a client's id never keys anything.
        model: The served model's name.
        prompts: Token ids.
        jobs: One per completion, those of the first prompt first.
    """

    request_id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    jobs: tuple[Job, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def attributes(self) -> dict[str, Attribute]:
        """For the request's span."""
        return {
            "request_id": self.request_id,
            "client_request_id": self.jobs[0].client_request_id,
            "completions": len(self.jobs),
            "gen_ai.request.model": self.model,
            "gen_ai.usage.input_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True, slots=True)
class Started:
    """The first event, once."""


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one completion.

    Attributes:
        index: Which one.
        text: May be empty while a character is incomplete or a stop string may be forming.
        token_ids: May be empty when text that was held back comes at the end.
        logprobs: As many as token ids, if they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one completion.

    Attributes:
        index: Which one.
        reason: Why it ended.
        stop_match: The stop string, or the id of the stop token, that ended it.
        completion_tokens: Its length.
        cached_tokens: Prompt tokens whose computation a cache saved.
        migrations: Times that it went on on another decode worker.
    """

    index: int
    reason: common_pb2.FinishReason.ValueType
    stop_match: str | int | None
    completion_tokens: int
    cached_tokens: int
    migrations: int = 0


Event = Started | Delta | Finished


class Completions:
    """Serves completions of one model.

    Args:
        model: What is served.
        tokenizing: Turns texts into tokens.
        dispatcher: Runs jobs on the fleet.
        fleet: The workers as known now, for the window and the names of the model.
        metrics: The router's.
        request_timeout: Seconds that any request may take.
        slo: Objectives of requests that bring none.
        tenants: Where requests name their tenant.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizing: TokenizingPool,
        dispatcher: Dispatcher,
        fleet: Callable[[], Fleet],
        metrics: RouterMetrics,
        *,
        request_timeout: float = 600.0,
        slo: Slo | None = None,
        tenants: TenantHeader | None = None,
    ) -> None:
        self.model = model
        self._tokenizing = tokenizing
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._metrics = metrics
        self._request_timeout = request_timeout
        self._slo = Slo() if slo is None else slo
        self.tenants = TenantHeader() if tenants is None else tenants
        self._running: Counter[asyncio.Task[Any]] = Counter()
        self._draining = False
        self._cutting = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Requests that were accepted and have not ended."""
        return self._running.total()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def window(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return min(self.model.max_positions, self._fleet().max_model_len or self.model.max_positions)

    def names(self) -> list[str]:
        """The names of the model: the router's own, then others that its workers registered."""
        fleet = self._fleet()
        registered = {view.info.model.id for view in (*fleet.decodes, *fleet.prefills)}
        return [self.model.name, *sorted(registered - {self.model.name})]

    def model_name(self, asked: str) -> str:
        """The name under which the model answers to `asked`; empty asks for whatever there is. Raises NotFound."""
        names = self.names()
        if not asked:
            return names[0]
        if asked not in names:
            raise NotFound(f"the model {asked[:200]!r} does not exist; this server has {names}", field="model")
        return asked

    async def drain(self, grace: float) -> None:
        """Takes no new requests, waits for the running ones, and ends with an error what runs after `grace` seconds."""
        self._draining = True
        if await self._became_idle(grace):
            return
        _log.warning("ending requests that outlast the grace", extra={"running": self.running})
        self._cutting = True
        for task in list(self._running):
            task.cancel()
        await self._became_idle(_CUT_SECONDS)

    async def _became_idle(self, within: float) -> bool:
        try:
            async with asyncio.timeout(within):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # Validation.

    @contextmanager
    def counting_refused(self) -> Iterator[None]:
        """Around whatever reads a request, up to `prepare`, which does so itself: counts one that is refused there."""
        try:
            yield
        except HmaError as exc:
            self._metrics.requests.labels(exc.code).inc()
            raise

    async def prepare(self, request: CompletionRequest) -> Prepared:
        """Validates and tokenizes; counts a refused request.

        Raises:
            HmaError: What is wrong, with the field at fault.
        """
        with self.counting_refused():
            try:
                return await self._prepare(request, asyncio.get_running_loop().time())
            except Shed as exc:
                loop, slo = asyncio.get_running_loop(), request.slo.or_else(self._slo)
                wanted = max(1, request.n * len(request.prompts))
                self._count_failure(exc, [Pace(self._metrics, slo, loop.time()) for _ in range(wanted)])
                raise

    async def _prepare(self, request: CompletionRequest, arrived: float) -> Prepared:
        if self._draining:
            raise Unavailable("this router is shutting down", retry_after=1.0)
        model = self.model_name(request.model)
        if not request.prompts:
            raise InvalidArgument("prompt must not be empty", field="prompt")
        wanted = request.n * len(request.prompts)
        if not 1 <= wanted <= MAX_COMPLETIONS:
            raise InvalidArgument(
                f"a request may ask for 1 to {MAX_COMPLETIONS} completions, prompts times n, not {wanted}",
                field="prompt" if request.n == 1 else "n",
            )
        self._check_vocabulary(request.sampling.logit_bias, "logit_bias")
        self._check_vocabulary(request.stop.stop_token_ids, "stop_token_ids")
        with request.trace.span(TOKENIZE):
            prompts = tuple([await self._token_ids(prompt) for prompt in request.prompts])
        request_id = secrets.token_hex(16)
        timeout = min(self._request_timeout, self._request_timeout if request.timeout is None else request.timeout)
        template = Job(
            request_id=request_id,
            model=model,
            prompt=(),
            max_tokens=0,
            sampling=request.sampling,
            stop=request.stop,
            arrived=arrived,
            deadline=arrived + timeout,
            client_request_id=request.client_request_id,
            slo=request.slo.or_else(self._slo),
            priority=request.priority,
            tenant=request.tenant,
            trace=request.trace,
        )
        jobs = [
            replace(
                template,
                request_id=f"{request_id}-{position * request.n + copy}",
                prompt=prompt,
                max_tokens=self._max_tokens(request, len(prompt)),
                sampling=_sampling_of_copy(request.sampling, copy),
            )
            for position, prompt in enumerate(prompts)
            for copy in range(request.n)
        ]
        return Prepared(request_id, model, prompts, tuple(jobs))

    async def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        field_name = "prompt"
        if isinstance(prompt, str):
            ids = await _tokenized(self._tokenizing.encode(prompt))
        elif isinstance(prompt, Conversation):
            field_name = "messages"
            conversation = with_roles_of(prompt, self.model.chat_template)
            ids = await _tokenized(self._tokenizing.encode_conversation(conversation))
        else:
            ids = prompt
            self._check_vocabulary(ids, field_name)
        if not ids:
            raise InvalidArgument(f"{field_name} must not be empty", field=field_name)
        if len(ids) >= self.window:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens; the model's window is {self.window}, and the completion needs at "
                "least one of them",
                field=field_name,
            )
        return ids

    def _check_vocabulary(self, ids: Iterable[int], field_name: str) -> None:
        worst = max(ids, default=0)
        if worst >= self.model.vocab_size:
            raise InvalidArgument(
                f"{field_name} has token id {worst}; the model's vocabulary ends at {self.model.vocab_size - 1}",
                field=field_name,
            )

    def _max_tokens(self, request: CompletionRequest, prompt_tokens: int) -> int:
        room = self.window - prompt_tokens
        asked = request.stop.max_tokens
        if asked is None:
            length = min(room, request.default_max_tokens or room)
            if request.stop.min_tokens > length:
                raise InvalidArgument(f"min_tokens must not exceed max_tokens, here {length}", field="min_tokens")
            return length
        if asked > room:
            raise ContextLengthExceeded(
                f"the prompt's {prompt_tokens} tokens and max_tokens={asked} do not fit the model's window of "
                f"{self.window} tokens",
                field="max_tokens",
            )
        return asked

    # Running.

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Yields the request's events: `Started`, deltas, one `Finished` per completion.

        Close it (`contextlib.aclosing`) when leaving early: that frees the workers.

        Raises:
            HmaError: The request was shed or failed.
        """
        loop = asyncio.get_running_loop()
        task = self._begin()
        outcome = "cancelled"
        failure: Exception | None = None
        started = False
        paces = [Pace(self._metrics, job.slo, job.arrived) for job in prepared.jobs]
        try:
            paced = zip(prepared.jobs, paces, strict=True)
            streams = [self._completion(index, job, pace) for index, (job, pace) in enumerate(paced)]
            async with aclosing(merge(streams)) as events:
                async for event in events:
                    if not started:
                        started = True
                        yield Started()
                    if not isinstance(event, Started):
                        yield event
            outcome = "ok"
        except asyncio.CancelledError:
            if not self._cutting:
                if loop.time() >= prepared.jobs[0].deadline - _CLOCK_SLACK:
                    # gRPC itself ends a call whose time is up, and nobody is there to be told.
                    failure = DeadlineExceeded("the request's deadline passed")
                raise
            # The drain cancelled the task to get here; the client is told instead of cut off.
            task.uncancel()
            failure = Unavailable("this router is shutting down", retry_after=1.0)
            raise failure from None
        except Exception as exc:
            failure = exc
            raise
        finally:
            self._end(task)
            if failure is not None:
                outcome = failure.code if isinstance(failure, HmaError) else Internal.code
                self._count_failure(failure, paces)
            self._metrics.requests.labels(outcome).inc()
            if outcome == "ok":
                self._metrics.prompt_tokens.inc(prepared.prompt_tokens)
                self._metrics.request_seconds.observe(loop.time() - prepared.jobs[0].arrived)

    def _count_failure(self, failure: Exception, paces: Iterable[Pace]) -> None:
        if isinstance(failure, Shed):
            self._metrics.shed.labels(failure.reason).inc()
        if not isinstance(failure, CLIENTS_FAULT):
            for pace in paces:
                pace.fail()

    def _begin(self) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] += 1
        self._idle.clear()
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running[task] -= 1
        if not self._running[task]:
            del self._running[task]
        if not self._running:
            self._idle.set()

    async def _completion(self, index: int, job: Job, pace: Pace) -> AsyncGenerator[Event, None]:
        text = GeneratedText(self.model.tokenizer, job.stop)
        produced = cached = 0
        async with aclosing(self._dispatcher.run(job)) as steps:
            async for step in steps:
                if isinstance(step, Placed):
                    pace.placed(step.placement.prediction)
                    yield Started()
                    continue
                if isinstance(step, Tokens):
                    piece, token_ids, logprobs = text.push(step.token_ids), step.token_ids, step.logprobs
                    pace.note(piece.taken)
                else:
                    piece, token_ids, logprobs = text.finish(), (), ()
                produced += piece.taken
                cached = max(cached, step.cached_tokens)
                if piece.text or piece.taken:
                    yield Delta(index, piece.text, token_ids[: piece.taken], logprobs[: piece.taken])
                if piece.matched is not None:
                    pace.finish()
                    migrations = step.migrations
                    yield Finished(index, common_pb2.FINISH_REASON_STOP, piece.matched, produced, cached, migrations)
                    return
                if isinstance(step, Ended):
                    pace.finish()
                    yield Finished(index, step.reason, step.stop_token_id, produced, cached, step.migrations)


class TextsWait(Shed):
    """More text waits to be tokenized than there is room for."""

    reason = "tokenizing"


async def _tokenized(tokenizing: Awaitable[list[int]]) -> tuple[int, ...]:
    try:
        return tuple(await tokenizing)
    except ResourceExhausted as exc:
        raise TextsWait(exc.message, retry_after=exc.retry_after) from exc


def _sampling_of_copy(sampling: SamplingParams, copy: int) -> SamplingParams:
    """The n completions of one prompt must differ although they share a seed.

    A seed is drawn for a request that brings none: what goes on on another worker then goes on with the same numbers.
    """
    if sampling.seed is None:
        return sampling if sampling.greedy else replace(sampling, seed=secrets.randbits(64))
    return replace(sampling, seed=(sampling.seed + copy) % (MAX_SEED + 1)) if copy else sampling
