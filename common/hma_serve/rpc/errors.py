"""The one translation between typed errors and gRPC statuses.

A status carries `hma_serve.v1.ErrorDetail` (and `RetryInfo` when a retry makes sense) in its details, so the other side
gets the same typed error back, message and field included. An exception that is not an `HmaError` is a bug: it is
logged here and leaves as INTERNAL without its text.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hma_serve.core.error_detail import error_detail, from_error_detail
from hma_serve.core.errors import ERRORS, HmaError, Internal, InvalidArgument, Unavailable
from hma_serve.v1 import common_pb2

_log = logging.getLogger(__name__)

_STATUS_DETAILS = "grpc-status-details-bin"

# Statuses that arrive without our detail (from gRPC itself) become the error with the same status.
_BY_STATUS: dict[str, type[HmaError]] = {}
for _kind in ERRORS.values():
    _BY_STATUS.setdefault(_kind.grpc_status, _kind)


def to_status(error: HmaError) -> status_pb2.Status:
    """The full status, with details, for the wire."""
    code: int = grpc.StatusCode[error.grpc_status].value[0]
    detail = error_detail(error)
    status = status_pb2.Status(code=code, message=detail.message)
    details = [detail]
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    for message in details:
        packed = AnyMessage()
        packed.Pack(message)
        status.details.append(packed)
    return status


def from_rpc_error(error: grpc.RpcError) -> HmaError:
    """The typed error behind a failed call."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return Unavailable(f"the call failed: {error}")
    for detail in _details(error):
        found = common_pb2.ErrorDetail()
        if detail.Is(found.DESCRIPTOR) and detail.Unpack(found):
            return from_error_detail(found)
    kind = _BY_STATUS.get(error.code().name, Internal)
    return kind(error.details() or error.code().name)


def is_transport_failure(error: grpc.RpcError) -> bool:
    """Whether gRPC itself could not reach the peer; errors that a peer of ours raises carry details."""
    if not isinstance(error, grpc.aio.AioRpcError) or error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return all(key != _STATUS_DETAILS for key, _ in error.trailing_metadata())


def _details(error: grpc.aio.AioRpcError) -> list[AnyMessage]:
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:
        return []
    return list(status.details) if status is not None else []


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HmaError) -> None:
    """Ends the call with the error's status; always raises."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Lets servicers raise `HmaError` and nothing else.

    Args:
        role: Named in the message of an internal error, so that the caller knows whose log to read.
    """

    def __init__(self, role: str) -> None:
        self._role = role

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        make, behaviour = _parts(handler)
        # A streaming method is either an async generator or a coroutine that reads and writes through its context.
        wrap = self._wrap_generator if inspect.isasyncgenfunction(behaviour) else self._wrap_coroutine
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            wrap(behaviour, handler_call_details.method),
            request_deserializer=_safe_deserializer(handler),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _wrap_coroutine(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if isinstance(request, HmaError):
                await abort(context, request)
            try:
                return await behaviour(request, context)
            except Exception as exc:
                await self._fail(exc, method, context)

        return call

    def _wrap_generator(
        self, behaviour: Callable[..., AsyncIterator[Any]], method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            if isinstance(request, HmaError):
                await abort(context, request)
            responses = behaviour(request, context)
            try:
                async for response in responses:
                    yield response
            except Exception as exc:
                await self._fail(exc, method, context)
            finally:
                await _close(responses)

        return call

    async def _fail(self, exc: Exception, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if isinstance(exc, grpc.aio.AbortError):
            raise exc
        if isinstance(exc, NotImplementedError):
            # How gRPC's generated servicers leave a method out; its own for health does so with `List`.
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented")
        if not isinstance(exc, HmaError):
            _log.error("%s failed", method, exc_info=exc)
            exc = Internal(f"internal error; the log of the {self._role} says more")
        await abort(context, exc)


def _parts(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The factory for a handler of the same arity, and the handler's function."""
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, handler.stream_stream
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _safe_deserializer(handler: Any) -> Callable[[bytes], Any] | None:
    """A deserializer for bytes that are no message, which gRPC would report as UNKNOWN and log with a traceback.

    A stream is read inside the handler, where the error can be raised. A single request is read before, so the error
    takes its place and is raised by the wrapped handler.
    """
    parse = handler.request_deserializer
    if parse is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as exc:
            error = InvalidArgument(f"the request is not a valid message: {exc}")
            if handler.request_streaming:
                raise error from exc
            return error

    return read


async def _close(responses: AsyncIterator[Any]) -> None:
    """Runs a generator's `finally` now rather than when it is collected."""
    close = getattr(responses, "aclose", None)
    if close is not None:
        await close()
