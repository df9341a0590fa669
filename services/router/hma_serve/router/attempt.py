"""One attempt at a request: both legs under one scope.

Order: decode is asked first and answers with a ticket, then prefill is told to push there, then tokens are relayed.
When either leg fails, or the caller goes away, the other is cancelled at once, and neither call is left behind: leaving
the scope cancels both and waits for the prefill leg's end.

A failure of the prefill leg counts only until decode has started: from then on decode holds the whole prompt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum

import grpc
import grpc.aio

from hma_serve.core.errors import HmaError, Internal, Unavailable
from hma_serve.core.request import SamplingParams, Slo, StopConditions
from hma_serve.core.worker import WorkerInfo
from hma_serve.router.admission import Held
from hma_serve.rpc import ChannelCache, from_rpc_error, is_transport_failure
from hma_serve.telemetry.tracing import Trace
from hma_serve.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

_log = logging.getLogger(__name__)

# A decode worker answers between two steps, and a step of a large model on a CPU can take seconds.
_ANSWER_TIMEOUT = 30.0
# Part of a ticket's lease after which it is renewed.
_RENEW_AT = 0.3

DECODE_ADDRESS = "decode_address"
"""The field that a prefill worker names when decode there could not be reached, stalled or answered with nonsense."""

_DecodeCall = grpc.aio.UnaryStreamCall[decode_pb2.DecodeGenerateRequest, decode_pb2.DecodeGenerateResponse]


class Leg(StrEnum):
    """Which worker of the pair."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Job:
    """One completion to compute, tokenized and validated.

    Attributes:
        request_id: Minted by the router.
        model: Name of the served model.
        prompt: Token ids, at least one.
        max_tokens: Length of the completion at most.
        sampling: How tokens are drawn.
        stop: When it ends; the stop strings are matched by the router.
        arrived: Seconds of the loop's clock.
        deadline: Same clock.
        client_request_id: For logs and traces.
        slo: Objectives.
        priority: Higher goes first.
        tenant: Whose it is.
        trace: The request's place in its trace.
        emitted: Tokens that earlier attempts have already relayed.
    """

    request_id: str
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: StopConditions
    arrived: float
    deadline: float
    client_request_id: str = ""
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    tenant: str = ""
    trace: Trace = field(default_factory=Trace)
    emitted: tuple[int, ...] = ()


class AttemptFailed(Exception):
    """An attempt ended without finishing.

    Attributes:
        leg: Whose call failed.
        instance: That worker.
        error: What it said.
        unreachable: The connection failed, as opposed to the worker answering with an error.
        witness: The worker that could not reach `instance`, if it was not this router.
    """

    def __init__(
        self, leg: Leg, instance: str, error: HmaError, *, unreachable: bool, witness: str | None = None
    ) -> None:
        super().__init__(f"{leg} {instance}: {error.message}")
        self.leg = leg
        self.instance = instance
        self.error = error
        self.unreachable = unreachable
        self.witness = witness


class Attempt:
    """Runs a job once on one placement.

    Args:
        job: What to compute.
        held: The placement; the prefill part is released as soon as prefill is done, the rest by the caller.
        epoch: Number of the attempt, from 1.
        channels: To reach the workers.
    """

    def __init__(self, job: Job, held: Held, epoch: int, channels: ChannelCache) -> None:
        self._job = job
        self._held = held
        self._placement = held.placement
        self._epoch = epoch
        self._channels = channels
        self._trace = job.trace
        self._started = False
        self._prefill_failure: AttemptFailed | None = None
        self.cached_tokens = 0

    @property
    def started(self) -> bool:
        """Whether decode held the whole prompt."""
        return self._started

    async def run(self, trace: Trace) -> AsyncGenerator[decode_pb2.DecodeGenerateResponse, None]:
        """Yields what decode says after the ticket: started, tokens, and finished as the last.

        Close the iterator (`contextlib.aclosing`) when leaving early.

        Args:
            trace: The attempt's place in the request's trace; the workers' spans hang below it.

        Raises:
            AttemptFailed: One of the legs failed.
        """
        self._trace = trace
        decode = self._placement.decode
        with self._channels.lease(decode.address) as channel:
            stub = decode_pb2_grpc.DecodeStub(channel)
            call = stub.Generate(self._decode_request(), timeout=self._remaining())
            beside: list[asyncio.Task[None]] = []
            try:
                ticket = await self._ticket(call)
                prefill = self._placement.prefill
                if prefill is not None and ticket.present_tokens < self._placement.packed_tokens:
                    beside.append(asyncio.create_task(self._prefill(prefill, ticket, call)))
                    beside.append(asyncio.create_task(self._renew(stub, ticket)))
                else:
                    self.cached_tokens = ticket.present_tokens
                    self._held.release_prefill()
                async for response in self._relay(call):
                    yield response
            finally:
                call.cancel()
                for task in beside:
                    task.cancel()
                if beside:
                    await asyncio.wait(beside)

    # The decode leg.

    async def _ticket(self, call: _DecodeCall) -> decode_pb2.Ticket:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                response = await call.read()
        except grpc.RpcError as exc:
            raise self._failed(Leg.DECODE, exc) from exc
        except TimeoutError:
            raise self._broken(Leg.DECODE, f"no ticket within {_ANSWER_TIMEOUT:g} s", unreachable=True) from None
        if isinstance(response, decode_pb2.DecodeGenerateResponse) and response.HasField("ticket"):
            return response.ticket
        raise self._broken(Leg.DECODE, "the first response was no ticket")

    async def _relay(self, call: _DecodeCall) -> AsyncGenerator[decode_pb2.DecodeGenerateResponse, None]:
        while True:
            try:
                response = await call.read()
            except grpc.RpcError as exc:
                raise self._prefill_failure or self._failed(Leg.DECODE, exc) from exc
            except asyncio.CancelledError:
                # Either the prefill leg cancelled the call, or somebody cancels this task.
                if self._prefill_failure is not None and not _being_cancelled():
                    raise self._prefill_failure from None
                raise
            if not isinstance(response, decode_pb2.DecodeGenerateResponse):
                raise self._prefill_failure or self._broken(Leg.DECODE, "the stream ended before the completion did")
            event = response.WhichOneof("event")
            self._started = self._started or event in ("started", "tokens", "finished")
            yield response
            if event == "finished":
                return

    async def _renew(self, stub: decode_pb2_grpc.DecodeAsyncStub, ticket: decode_pb2.Ticket) -> None:
        """Keeps the ticket's lease alive until the prompt's KV is there; a failed renewal is left to the stream."""
        lease = ticket.lease.ToNanoseconds() / 1e9
        request = decode_pb2.ExtendRequest(nonce=ticket.nonce, epoch=ticket.epoch)
        while lease > 0:
            await asyncio.sleep(lease * _RENEW_AT)
            if self._started:
                return
            try:
                await stub.Extend(request, timeout=lease * _RENEW_AT)
            except grpc.RpcError as exc:
                _log.warning("a ticket's lease was not renewed: %s", from_rpc_error(exc).message)

    # The prefill leg.

    async def _prefill(self, worker: WorkerInfo, ticket: decode_pb2.Ticket, decode_call: _DecodeCall) -> None:
        """Runs the prefill leg to its end; a failure that matters ends the decode leg."""
        try:
            await self._prefill_stream(worker, ticket)
        except grpc.RpcError as exc:
            failure = self._failed(Leg.PREFILL, exc)
        except AttemptFailed as exc:
            failure = exc
        except Exception:
            # A bug, but one that must not leave decode waiting for KV that never comes.
            _log.exception("the prefill leg failed")
            failure = self._broken(Leg.PREFILL, "internal error; the log of the router says more")
        else:
            return
        finally:
            self._held.release_prefill()
        if not self._started:
            self._prefill_failure = failure
            decode_call.cancel()

    async def _prefill_stream(self, worker: WorkerInfo, ticket: decode_pb2.Ticket) -> None:
        with self._channels.lease(worker.address) as channel:
            call = prefill_pb2_grpc.PrefillStub(channel).Prefill(
                self._prefill_request(ticket), timeout=self._remaining()
            )
            try:
                async with asyncio.timeout(_ANSWER_TIMEOUT):
                    response = await call.read()
                while isinstance(response, prefill_pb2.PrefillResponse):
                    if response.HasField("completed"):
                        self.cached_tokens = response.completed.cached_tokens
                        return
                    response = await call.read()
                raise self._broken(Leg.PREFILL, "the stream ended before the prompt's KV was delivered")
            except TimeoutError:
                raise self._broken(Leg.PREFILL, f"no answer within {_ANSWER_TIMEOUT:g} s", unreachable=True) from None
            finally:
                call.cancel()

    # Messages.

    def _context(self) -> common_pb2.RequestContext:
        """Without a deadline: the call's timeout says it, whatever the worker's clock is."""
        job = self._job
        return common_pb2.RequestContext(
            request_id=job.request_id,
            client_request_id=job.client_request_id,
            model=job.model,
            epoch=self._epoch,
            tenant=job.tenant,
            priority=job.priority,
            slo=self._slo_left(),
            trace=self._trace.to_message(),
        )

    def _slo_left(self) -> common_pb2.Slo:
        """Objectives as from now on: the request has been waiting here, and workers serve the earliest due first."""
        left = self._job.slo.to_proto()
        if self._job.slo.ttft is not None:
            waited = asyncio.get_running_loop().time() - self._job.arrived
            left.ttft_seconds = max(0.0, self._job.slo.ttft - waited)
        return left

    def _decode_request(self) -> decode_pb2.DecodeGenerateRequest:
        job, prefill = self._job, self._placement.prefill
        stop = job.stop.to_proto()
        stop.max_tokens = job.max_tokens
        # Matched here, on text; decode has no text.
        del stop.stop_strings[:]
        return decode_pb2.DecodeGenerateRequest(
            context=self._context(),
            prompt_token_ids=job.prompt,
            emitted_token_ids=job.emitted,
            packed_tokens=self._placement.packed_tokens,
            offer=_offer(prefill) if prefill is not None else None,
            sampling=job.sampling.to_proto(),
            stop=stop,
        )

    def _prefill_request(self, ticket: decode_pb2.Ticket) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            context=self._context(),
            token_ids=self._job.prompt[: self._placement.packed_tokens],
            ticket=ticket.nonce,
            decode_address=ticket.push_address or self._placement.decode.address,
            token_start=ticket.present_tokens,
            agreement=ticket.agreement if ticket.HasField("agreement") else None,
        )

    def _remaining(self) -> float:
        return max(0.0, self._job.deadline - asyncio.get_running_loop().time())

    # Failures.

    def _failed(self, leg: Leg, exc: grpc.RpcError) -> AttemptFailed:
        error = from_rpc_error(exc)
        if leg is Leg.PREFILL and error.field == DECODE_ADDRESS:
            # Prefill is well; decode, or the path from it to decode, is not. Decode is checked, and both are avoided.
            decode, prefill = self._instance(Leg.DECODE), self._instance(Leg.PREFILL)
            return AttemptFailed(Leg.DECODE, decode, error, unreachable=True, witness=prefill)
        return AttemptFailed(leg, self._instance(leg), error, unreachable=is_transport_failure(exc))

    def _broken(self, leg: Leg, message: str, *, unreachable: bool = False) -> AttemptFailed:
        kind = Unavailable if unreachable else Internal
        return AttemptFailed(leg, self._instance(leg), kind(f"{leg} worker: {message}"), unreachable=unreachable)

    def _instance(self, leg: Leg) -> str:
        prefill = self._placement.prefill
        worker = prefill if leg is Leg.PREFILL and prefill is not None else self._placement.decode
        return worker.instance


def _offer(prefill: WorkerInfo) -> decode_pb2.KvOffer:
    """What the prefill worker can put on the wire, and for an older decode worker the codecs that it has of its own."""
    return decode_pb2.KvOffer(
        model_fingerprint=prefill.model.stream_fingerprint,
        k_codec=prefill.codecs[0].to_proto(),
        v_codec=prefill.codecs[-1].to_proto(),
        rope=prefill.model.rope.to_proto(),
        producer_instance=prefill.instance,
        k_offsets=bool(prefill.model.kv_fingerprint),
        profile=prefill.profile,
        support=None if prefill.kv is None else prefill.kv.to_proto(),
    )


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
