"""The engine: the one owner of tickets, pages and running sequences, driven by messages and its own steps.

Its life is a loop of four verbs: *receive* what the front asks, *sweep* what has run out, *step* what runs, *send* what
came of it. Everything happens on one thread, so between two steps nothing is half done: a cancelled stream's pages are
free before the next step begins, and a step never meets a page that changes hands.

A stream's life: admitted (pages held, ticket issued) -> its KV arrives and is committed -> joins the batch -> finished,
failed or closed, which all free its pages and its ticket. Nothing is sampled before the commit.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from google.protobuf.message import Message

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    HmaError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.core.request import SamplingParams, StopConditions, Structure
from hma_serve.decode.arrivals import Arrivals
from hma_serve.decode.commitment import Commitment
from hma_serve.decode.grammar import Grammar, GrammarQueue
from hma_serve.decode.intake import Arrival, Intake, Packed
from hma_serve.decode.pages import PagePool
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.sequence import Ending, Sequence
from hma_serve.decode.step_loop import StepFailed, StepLoop, Token
from hma_serve.decode.step_meter import StepMeter, Work
from hma_serve.decode.tickets import Ticket, TicketTable
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.v1 import common_pb2, decode_pb2

_log = logging.getLogger(__name__)

_LOAD_INTERVAL = 0.25
_RETRY_AFTER = 0.2
_COMPILE_POLL = 0.002
# Steps in a row that may fail before the engine gives up.
_FAILED_STEPS = 10

_REASONS = {Ending.STOP: common_pb2.FINISH_REASON_STOP, Ending.LENGTH: common_pb2.FINISH_REASON_LENGTH}


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine refuses beyond.

    Attributes:
        max_running: Streams, those that wait for their KV included.
        eos: Tokens that end a text.
        vocab: Tokens there are.
    """

    max_running: int
    eos: frozenset[int]
    vocab: int


@dataclass(slots=True, eq=False)
class _Stream:
    """One admitted request."""

    sequence: Sequence
    arrival: Arrival
    prefix_keys: Items[bytes]
    ticket: Ticket
    admitted: float
    joined: bool = False
    announced: bool = False


class Engine:
    """See the module.

    Args:
        pool: All pages.
        intake: Puts packed KV into them.
        commitment: Gives them to requests.
        tickets: The table; its lease and clock are the engine's.
        scheduler: Who runs.
        steps: Computes the scheduler's steps.
        grammars: Where requests for structured output wait.
        limits: What to refuse.
        arena: Where blocks arrive.
        arrival_share: Of a step's time that storing KV may take between two steps.
        emit: Sends events to the front, in order.
        clock: Monotonic seconds.
        mint_seed: A seed for requests that bring none.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        intake: Intake,
        commitment: Commitment,
        tickets: TicketTable,
        scheduler: Scheduler,
        steps: StepLoop,
        grammars: GrammarQueue,
        limits: EngineLimits,
        arena: Arena,
        arrival_share: float = 0.15,
        emit: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
        mint_seed: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        self._pool = pool
        self._intake = intake
        self._commitment = commitment
        self._tickets = tickets
        self._scheduler = scheduler
        self._loop = steps
        self._grammars = grammars
        self._compiling: dict[int, pb.DecodeAdmit] = {}
        self._limits = limits
        self._arena = arena
        self._arrivals = Arrivals(arrival_share, clock)
        self._emit = emit
        self._clock = clock
        self._mint_seed = mint_seed
        self._streams: dict[int, _Stream] = {}
        self._outbox: list[pb.DecodeEngineEvent] = []
        self._meter = StepMeter(scheduler.step_tokens)
        self._begun = self._taken = 0.0
        self._late_blocks = 0
        self._expired_tickets = 0
        self._failed_steps = 0
        self._reported: tuple[int, ...] = ()
        self._reported_at = 0.0
        self._handlers: dict[str, Callable[..., None]] = {
            "admit": self._admit,
            "close": self._close,
            "extend": self._extend,
            "release": self._release,
            "attach": self._attach,
            "block": self._block,
            "end_push": self._end_push,
            "detach": self._detach,
        }

    def turn(self, commands: Iterable[pb.DecodeEngineCommand]) -> float | None:
        """One round of the loop: takes the commands, sweeps, steps and sends.

        Returns:
            How long the caller may wait for the next commands: 0 when there is more to compute, None for ever.
        """
        for command in self._arrivals.sort(commands):
            self._receive(command)
        for command in self._arrivals.take(self._meter.mean_seconds if len(self._scheduler) else None):
            self._receive(command)
        self._admit_compiled()
        self._sweep()
        self._step()
        self._report_load()
        # What has landed is said below, and the slots are used again.
        self._intake.settle()
        self._send()
        if not self._streams and self._loop.idle:
            # An idle engine proves that it lost nothing.
            self._pool.check_integrity()
        return self._patience()

    # Receive.

    def _receive(self, command: pb.DecodeEngineCommand) -> None:
        kind = command.WhichOneof("command")
        if kind is not None:
            self._handlers[kind](getattr(command, kind))

    def _admit(self, admit: pb.DecodeAdmit) -> None:
        """At once, or once its grammar is compiled."""
        if not admit.sampling.HasField("structure"):
            self._admit_with(admit, None)
            return
        try:
            self._grammars.add(admit.stream, Structure.from_proto(admit.sampling.structure), self._clock())
        except HmaError as exc:
            self._refuse(admit.stream, exc)
        else:
            self._compiling[admit.stream] = admit

    def _admit_compiled(self) -> None:
        for number, grammar in self._grammars.take_ready(self._clock()):
            admit = self._compiling.pop(number)
            if isinstance(grammar, HmaError):
                self._refuse(number, grammar)
            else:
                self._admit_with(admit, grammar)

    def _refuse(self, number: int, error: HmaError) -> None:
        self._say(failed=pb.DecodeStreamFailed(stream=number, error=error_detail(error)))

    def _admit_with(self, admit: pb.DecodeAdmit, grammar: Grammar | None) -> None:
        try:
            if grammar is not None:
                grammar.begin(admit.emitted_token_ids)
            stream = self._reserved(admit, grammar)
        except HmaError as exc:
            self._refuse(admit.stream, exc)
            return
        self._streams[admit.stream] = stream
        admitted = pb.DecodeAdmitted(
            stream=admit.stream,
            nonce=stream.ticket.nonce,
            lease_ns=int(self._tickets.lease * 1e9),
            present_tokens=stream.arrival.present_tokens,
        )
        self._say(admitted=admitted)
        if stream.arrival.present_tokens == admit.packed_tokens:
            self._join(stream)

    def _reserved(self, admit: pb.DecodeAdmit, grammar: Grammar | None) -> _Stream:
        """Holds what the request needs to begin, or refuses."""
        if len(self._streams) >= self._limits.max_running:
            raise ResourceExhausted(
                f"this decode worker runs {len(self._streams)} requests already", retry_after=_RETRY_AFTER
            )
        packed, keys = Packed.of(admit), list(admit.prefix_keys)
        need = self._intake.need(packed, len(admit.prompt_token_ids) + admit.stop.max_tokens)
        if not self._pool.fits_when_empty(need):
            raise FailedPrecondition(
                "the request needs more KV memory than this decode worker has; raise --kv-capacity-tokens",
                field="--kv-capacity-tokens",
            )
        tokens = [*admit.prompt_token_ids, *admit.emitted_token_ids]
        sampling = SamplingParams.from_proto(admit.sampling)
        sequence = Sequence(
            stream=admit.stream,
            pages=self._commitment.reserve(need, keys, len(tokens)),
            prompt_tokens=len(admit.prompt_token_ids),
            tokens=tokens,
            computed=admit.packed_tokens,
            sampling=sampling,
            seed=self._mint_seed() if sampling.seed is None else sampling.seed,
            stop=StopConditions.from_proto(admit.stop),
            eos=self._limits.eos,
            max_tokens=admit.stop.max_tokens,
            vocab=self._limits.vocab,
            deadline=admit.deadline_ns / 1e9 if admit.deadline_ns else None,
            priority=admit.priority,
            guide=grammar,
        )
        arrival = Arrival(packed, sequence.pages)
        ticket = self._tickets.issue(admit.stream, admit.epoch, committed=arrival.present_tokens == admit.packed_tokens)
        return _Stream(sequence, arrival, keys, ticket, self._clock())

    def _close(self, close: pb.DecodeClose) -> None:
        if self._compiling.pop(close.stream, None) is not None:
            self._grammars.drop(close.stream)
        self._drop(close.stream, None)

    def _extend(self, call: pb.DecodeTicketCall) -> None:
        answer = pb.DecodeTicketAnswer(call=call.call, lease_ns=int(self._tickets.lease * 1e9))
        try:
            self._tickets.renew(self._tickets.find(call.nonce, call.epoch))
        except HmaError as exc:
            answer = pb.DecodeTicketAnswer(call=call.call, error=error_detail(exc))
        self._say(answer=answer)

    def _release(self, call: pb.DecodeTicketCall) -> None:
        try:
            ticket = self._tickets.find(call.nonce, call.epoch)
        except HmaError as exc:
            self._say(answer=pb.DecodeTicketAnswer(call=call.call, error=error_detail(exc)))
            return
        self._fail(ticket.stream, Unavailable("the ticket was released"))
        self._say(answer=pb.DecodeTicketAnswer(call=call.call))

    def _attach(self, attach: pb.DecodeAttach) -> None:
        try:
            ticket = self._tickets.find(attach.nonce, attach.epoch)
            self._streams[ticket.stream].arrival.check(attach)
            self._tickets.attach(ticket, attach.push)
        except HmaError as exc:
            self._say(push_failed=pb.DecodePushFailed(push=attach.push, error=error_detail(exc)))
            return
        if not attach.resume:
            self._streams[ticket.stream].arrival.landed = 0
        self._say(attached=pb.DecodeAttached(push=attach.push))

    def _block(self, block: pb.DecodeBlock) -> None:
        ticket = self._tickets.attached(block.push)
        if ticket is not None:
            data = self._arena.slot(block.slot, block.length)
            self._streams[ticket.stream].arrival.take(block, data, self._intake)
            self._tickets.renew(ticket)
        else:
            # Blocks of a stream that lost its ticket are dropped; it was told, or has left.
            self._late_blocks += 1
        self._say(landed=pb.DecodeLanded(push=block.push, slot=block.slot, length=block.length))

    def _end_push(self, end: pb.DecodeEndPush) -> None:
        ticket = self._tickets.attached(end.push)
        if ticket is None:
            return
        stream = self._streams[ticket.stream]
        try:
            # The front has checked the same; a hole must not be read even if it was wrong.
            stream.arrival.require_complete(self._pool.geometry.layers, self._pool.geometry.kv_heads)
        except DataLoss as exc:
            self._tickets.detach(end.push)
            self._say(push_failed=pb.DecodePushFailed(push=end.push, error=error_detail(exc)))
            return
        self._tickets.commit(ticket)
        self._pool.publish(stream.sequence.pages, stream.prefix_keys)
        self._say(committed=pb.DecodeKvCommitted(push=end.push))
        self._join(stream)

    def _detach(self, detach: pb.DecodeDetach) -> None:
        ticket = self._tickets.detach(detach.push)
        if ticket is not None:
            self._tickets.renew(ticket)

    def _join(self, stream: _Stream) -> None:
        stream.joined = True
        self._commitment.join(stream.sequence)

    # Sweep.

    def _sweep(self) -> None:
        for ticket in self._tickets.expired():
            self._expired_tickets += 1
            self._fail(ticket.stream, Unavailable(f"the prompt's KV did not arrive within {self._tickets.lease:g} s"))
        now = self._clock()
        late = [number for number, s in self._streams.items() if s.sequence.deadline and s.sequence.deadline <= now]
        for number in late:
            self._fail(number, DeadlineExceeded("the request's deadline passed while it was decoded"))

    def _fail(self, number: int, error: HmaError) -> None:
        if self._drop(number, error):
            self._say(failed=pb.DecodeStreamFailed(stream=number, error=error_detail(error)))

    def _drop(self, number: int, error: HmaError | None) -> bool:
        """Frees everything of a stream; whether there was one."""
        stream = self._streams.pop(number, None)
        if stream is None:
            return False
        push = self._tickets.drop(stream.ticket)
        self._commitment.leave(stream.sequence)
        self._loop.leave(stream.sequence, partial(self._pool.free, stream.sequence.pages))
        if push is not None:
            reason = error or Unavailable("the request was cancelled while its KV was arriving")
            self._say(push_failed=pb.DecodePushFailed(push=push, error=error_detail(reason)))
        return True

    # Step.

    def _step(self) -> None:
        try:
            self._commitment.prepare(lambda: self._loop.settle(self._take))
            began, begun_before = self._clock(), self._begun
            self._begun = began
            taken = self._loop.turn(self._take)
        except StepFailed as exc:
            self._step_failed(exc)
            return
        if taken:
            now = self._clock()
            # The step that was taken: begun in this turn, or in the one before and then behind its predecessor.
            since = max(begun_before, self._taken) if self._loop.overlap else began
            self._taken = now
            self._meter.note(Work.of(taken), now - since)

    def _take(self, shares: Items[Share], tokens: Items[Token]) -> None:
        """What a step gave."""
        self._failed_steps = 0
        outputs = [output for token in tokens if (output := self._advance(token)) is not None]
        outputs += self._announced(shares)
        if outputs:
            self._say(step=pb.DecodeStep(outputs=outputs))

    def _step_failed(self, failed: StepFailed) -> None:
        """A bug or a device error ends the streams of this step, not the others; an engine that only fails leaves."""
        self._failed_steps += 1
        if self._failed_steps > _FAILED_STEPS and failed.__cause__ is not None:
            raise failed.__cause__
        _log.error("%s", failed, exc_info=failed.__cause__)
        for sequence in failed.sequences:
            self._fail(sequence.stream, Internal("internal error; the log of the decode worker says more"))

    def _advance(self, drawn: Token) -> pb.DecodeStreamOutput | None:
        """Takes a sequence's token; ends it if that was the last, or if it cannot go on."""
        sequence = drawn.sequence
        length = sequence.output_tokens
        try:
            ending = sequence.accept(drawn.token)
        except HmaError as exc:
            self._fail(sequence.stream, exc)
            return None
        output = pb.DecodeStreamOutput(stream=sequence.stream)
        self._announce(self._streams[sequence.stream], output)
        if sequence.output_tokens > length:
            output.tokens.token_ids.append(drawn.token)
            if drawn.logprob is not None:
                output.tokens.logprobs.append(_logprobs(drawn, drawn.logprob))
        if ending is not None:
            output.finished.CopyFrom(_finished(sequence, ending))
            self._drop(sequence.stream, None)
        return output

    def _announced(self, shares: Items[Share]) -> list[pb.DecodeStreamOutput]:
        """Says of streams whose prompt takes several steps that they have started."""
        outputs = []
        for share in shares:
            stream = self._streams.get(share.sequence.stream)
            if stream is not None and not stream.announced:
                outputs.append(pb.DecodeStreamOutput(stream=share.sequence.stream))
                self._announce(stream, outputs[-1])
        return outputs

    def _announce(self, stream: _Stream, output: pb.DecodeStreamOutput) -> None:
        if not stream.announced:
            stream.announced = True
            output.started.CopyFrom(decode_pb2.DecodeStarted(wait_seconds=self._clock() - stream.admitted))

    # Send.

    def _say(self, **event: Message | None) -> None:
        self._outbox.append(pb.DecodeEngineEvent(**event))  # type: ignore[arg-type]

    def _report_load(self) -> None:
        running = len(self._scheduler)
        counts = (
            running,
            len(self._streams) - running,
            self._pool.used_tokens,
            self._commitment.free_tokens,
            self._late_blocks,
            self._expired_tickets,
        )
        now = self._clock()
        if counts == self._reported and not (running and now - self._reported_at >= _LOAD_INTERVAL):
            return
        self._reported, self._reported_at = counts, now
        load = pb.DecodeEngineLoad(
            running=counts[0],
            waiting=counts[1],
            kv_used_tokens=counts[2],
            kv_free_tokens=counts[3],
            step_seconds=self._meter.mean_seconds,
            steps=self._meter.steps,
            preemptions=self._commitment.pauses,
            context_tokens=sum(sequence.computed for sequence in self._scheduler),
            cost=self._meter.cost,
            late_blocks=self._late_blocks,
            expired_tickets=self._expired_tickets,
        )
        self._say(load=load)

    def _send(self) -> None:
        if self._outbox:
            self._emit(*self._outbox)
            self._outbox.clear()

    def _patience(self) -> float | None:
        if len(self._scheduler) or self._commitment.paused or not self._loop.idle or len(self._arrivals):
            return 0
        if self._compiling:
            return _COMPILE_POLL
        moments = [self._tickets.next_expiry(), *(s.sequence.deadline for s in self._streams.values())]
        soonest = min((moment for moment in moments if moment is not None), default=None)
        return None if soonest is None else max(0.0, soonest - self._clock())


def _finished(sequence: Sequence, ending: Ending) -> decode_pb2.DecodeFinished:
    usage = common_pb2.Usage(prompt_tokens=sequence.prompt_tokens, completion_tokens=sequence.output_tokens)
    return decode_pb2.DecodeFinished(reason=_REASONS[ending], stop_token_id=sequence.stop_token, usage=usage)


def _logprobs(drawn: Token, logprob: float) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=drawn.token, logprob=logprob),
        top=[common_pb2.TokenLogprob(token_id=each.token, logprob=each.logprob) for each in drawn.top],
    )
