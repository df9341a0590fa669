"""The Decode service: one call of Generate is one request's life.

The call's end, for whatever reason, is what frees everything: leaving the engine's stream context posts the close, also
when the task is cancelled. A slow caller holds up its own call alone; its tokens are merged meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from hma_serve.core.errors import Cancelled, HmaError, Internal, NotFound, Unavailable
from hma_serve.decode.admission import Admission
from hma_serve.decode.engine_client import EngineClient
from hma_serve.decode.load import Load
from hma_serve.decode.stream_spans import StreamSpans
from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.telemetry.metrics import DecodeMetrics
from hma_serve.telemetry.spans import DECODE
from hma_serve.telemetry.tracing import Attribute, SpanKind, Trace
from hma_serve.v1 import decode_pb2, decode_pb2_grpc, kv_block_pb2

_Context = grpc.aio.ServicerContext[decode_pb2.DecodeGenerateRequest, decode_pb2.DecodeGenerateResponse]


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    """Serves `hma_serve.v1.Decode`.

    Args:
        engine: Where requests run.
        admission: What is refused before.
        load: Counts the open calls; says whether the worker is leaving.
        metrics: What is counted.
    """

    def __init__(self, engine: EngineClient, admission: Admission, load: Load, metrics: DecodeMetrics) -> None:
        self._engine = engine
        self._admission = admission
        self._load = load
        self._metrics = metrics
        self._push_addresses = itertools.cycle([""])

    def receive_at(self, addresses: Sequence[str]) -> None:
        """Says where producers push to: the tickets' streams are dealt out in turn.

        A stream that goes on in another call comes to the same address, as its ticket has one.
        """
        self._push_addresses = itertools.cycle(addresses)

    async def Generate(  # noqa: N802
        self, request: decode_pb2.DecodeGenerateRequest, context: _Context
    ) -> AsyncIterator[decode_pb2.DecodeGenerateResponse]:
        """See the schema."""
        with self._counted() as outcome, _traced(request) as spans:
            if self._load.draining:
                raise Unavailable("this decode worker is leaving; another can take the request")
            admit, agreement = self._admission.check(request, context.time_remaining())
            with self._engine.stream(admit) as stream:
                ticket = self._ticket(await stream.admitted(), admit.epoch, agreement)
                yield decode_pb2.DecodeGenerateResponse(ticket=ticket)
                async for output in stream.outputs():
                    for response in _responses(output):
                        self._count(response)
                        spans.passed(response)
                        if response.HasField("finished"):
                            # Said first: whoever has read the end may hang up before this call sees its own.
                            outcome.append("ok")
                        yield response

    async def Extend(  # noqa: N802
        self,
        request: decode_pb2.ExtendRequest,
        context: grpc.aio.ServicerContext[decode_pb2.ExtendRequest, decode_pb2.ExtendResponse],
    ) -> decode_pb2.ExtendResponse:
        """See the schema."""
        lease = await self._engine.extend(request.nonce, request.epoch)
        return decode_pb2.ExtendResponse(lease=_duration(lease))

    async def Release(  # noqa: N802
        self,
        request: decode_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[decode_pb2.ReleaseRequest, decode_pb2.ReleaseResponse],
    ) -> decode_pb2.ReleaseResponse:
        """See the schema: a ticket that is gone already is as good as released."""
        with contextlib.suppress(NotFound):
            await self._engine.release(request.nonce, request.epoch)
        return decode_pb2.ReleaseResponse()

    def _ticket(
        self, admitted: decode_engine_pb2.DecodeAdmitted, epoch: int, agreement: kv_block_pb2.KvAgreement | None
    ) -> decode_pb2.Ticket:
        return decode_pb2.Ticket(
            nonce=admitted.nonce,
            epoch=epoch,
            push_address=next(self._push_addresses),
            lease=_duration(admitted.lease_ns / 1e9),
            present_tokens=admitted.present_tokens,
            agreement=agreement,
        )

    def _count(self, response: decode_pb2.DecodeGenerateResponse) -> None:
        if response.HasField("tokens"):
            self._metrics.tokens.inc(len(response.tokens.token_ids))
        elif response.HasField("started"):
            self._metrics.wait_seconds.observe(response.started.wait_seconds)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[list[str]]:
        """Counts the call while it lasts and how it ended: what is appended, the error's code, or cancelled."""
        outcome: list[str] = []
        self._load.stream_opened()
        try:
            yield outcome
        except HmaError as exc:
            outcome.append(exc.code)
            raise
        except Exception:
            outcome.append(Internal.code)
            raise
        finally:
            self._load.stream_closed()
            self._metrics.requests.labels(outcome[-1] if outcome else Cancelled.code).inc()


@contextlib.contextmanager
def _traced(request: decode_pb2.DecodeGenerateRequest) -> Iterator[StreamSpans]:
    """The call's span, and those of its phases below it."""
    context = request.context
    attributes: dict[str, Attribute] = {
        "request_id": context.request_id,
        "epoch": context.epoch,
        "prompt_tokens": len(request.prompt_token_ids),
        "packed_tokens": request.packed_tokens,
    }
    with Trace.of_message(context.trace).span(DECODE, kind=SpanKind.SERVER, **attributes) as span:
        phases = StreamSpans(span.trace)
        try:
            yield phases
        finally:
            phases.ended()


def _responses(output: decode_engine_pb2.DecodeStreamOutput) -> Iterator[decode_pb2.DecodeGenerateResponse]:
    if output.HasField("started"):
        yield decode_pb2.DecodeGenerateResponse(started=output.started)
    if output.HasField("tokens"):
        yield decode_pb2.DecodeGenerateResponse(tokens=output.tokens)
    if output.HasField("finished"):
        yield decode_pb2.DecodeGenerateResponse(finished=output.finished)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
