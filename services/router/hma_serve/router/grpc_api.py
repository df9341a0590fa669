"""The public gRPC service: the same pipeline as HTTP, spoken in protobuf."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc.aio
from google.protobuf import struct_pb2

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import SamplingParams, Slo, StopConditions
from hma_serve.router.completion import CompletionRequest, Completions, Delta, Event, Finished, Prepared, Prompt
from hma_serve.router.conversation import checked_conversation
from hma_serve.telemetry.spans import REQUEST
from hma_serve.telemetry.tracing import SpanKind, Trace
from hma_serve.text import Conversation
from hma_serve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

_MAX_ID_CHARS = 256
_GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
_ListContext = grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`hma_serve.v1.Inference`; raises `HmaError`, which the server turns into statuses."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    async def Generate(  # noqa: N802  the name is the protocol's
        self, request: inference_pb2.GenerateRequest, context: _GenerateContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams one request's events; the call's deadline bounds it and its cancellation frees everything."""
        with _origin(context).span(REQUEST, kind=SpanKind.SERVER, **{"rpc.method": f"{SERVICE}/Generate"}) as span:
            with self._completions.counting_refused():
                tenant = self._completions.tenants.read(_metadata(context).get)
                asked = replace(_read(request, context.time_remaining()), trace=span.trace, tenant=tenant)
            prepared = await self._completions.prepare(asked)
            span.set(**prepared.attributes)
            async with aclosing(self._completions.run(prepared)) as events:
                async for event in events:
                    yield _response(event, prepared, with_prompt=request.return_prompt_token_ids)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: _ListContext
    ) -> inference_pb2.ListModelsResponse:
        """The served model under each of its names."""
        served = self._completions.model
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    id=name,
                    fingerprint=served.fingerprint,
                    max_model_len=self._completions.window,
                    created_unix_seconds=served.created,
                )
                for name in self._completions.names()
            ]
        )


def _metadata(context: _GenerateContext) -> dict[str, str]:
    """The call's headers of text."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _origin(context: _GenerateContext) -> Trace:
    """The caller's place in a trace, from the call's metadata."""
    return Trace.of_headers(_metadata(context))


def _read(message: inference_pb2.GenerateRequest, timeout: float | None) -> CompletionRequest:
    if len(message.client_request_id) > _MAX_ID_CHARS:
        raise InvalidArgument(
            f"client_request_id may have at most {_MAX_ID_CHARS} characters", field="client_request_id"
        )
    return CompletionRequest(
        prompts=(_prompt(message),),
        model=message.model,
        sampling=SamplingParams.from_proto(message.sampling),
        stop=StopConditions.from_proto(message.stop),
        n=message.n or 1,
        slo=Slo.from_proto(message.slo),
        priority=message.priority,
        client_request_id=message.client_request_id,
        timeout=timeout,
    )


def _prompt(message: inference_pb2.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "chat":
            return _conversation(message.chat)
        case _:
            raise InvalidArgument("give the prompt as text, as token_ids or as chat", field="prompt")


def _conversation(chat: inference_pb2.ChatPrompt) -> Conversation:
    return checked_conversation(
        [_message(message) for message in chat.messages],
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        variables={name: _value(value) for name, value in chat.template_kwargs.fields.items()},
    )


def _message(message: inference_pb2.ChatMessage) -> dict[str, str]:
    named = {"name": message.name} if message.HasField("name") else {}
    return {"role": message.role, "content": message.content, **named}


def _value(value: struct_pb2.Value) -> object:
    """A template's variable; a Struct has no integers, and `1.0` is not what a client wrote."""
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "null_value" | None:
            return None
        case _:
            return value


def _response(event: Event, prepared: Prepared, *, with_prompt: bool) -> inference_pb2.GenerateResponse:
    if isinstance(event, Delta):
        delta = inference_pb2.GenerateResponse.TextDelta(
            index=event.index, text=event.text, token_ids=event.token_ids, logprobs=event.logprobs
        )
        return inference_pb2.GenerateResponse(delta=delta)
    if isinstance(event, Finished):
        return inference_pb2.GenerateResponse(finished=_finished(event, prepared))
    started = inference_pb2.GenerateResponse.Started(
        request_id=prepared.request_id, model=prepared.model, prompt_tokens=prepared.prompt_tokens
    )
    if with_prompt:
        started.prompt_token_ids.extend(prepared.prompts[0])
    return inference_pb2.GenerateResponse(started=started)


def _finished(event: Finished, prepared: Prepared) -> inference_pb2.GenerateResponse.Finished:
    return inference_pb2.GenerateResponse.Finished(
        index=event.index,
        reason=event.reason,
        stop_match="" if event.stop_match is None else str(event.stop_match),
        usage=common_pb2.Usage(
            prompt_tokens=prepared.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_tokens=event.cached_tokens,
            migrations=event.migrations,
        ),
    )
