"""From a failed call to a typed error.

The server's own error travels in the trailing metadata `grpc-status-details-bin`, as a `google.rpc.Status` that holds
an `ErrorDetail`. The package that brings `google.rpc` is no part of the base install, so the bytes are parsed as
`StatusDetails`, which has the same fields. Failures of gRPC itself carry no detail and are told by their status.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from hma_serve.core.errors import ERRORS, Cancelled, DeadlineExceeded, HmaError, Internal, Unavailable
from hma_serve.v1 import common_pb2, status_pb2

# What gRPC says of a call that was cancelled, or whose channel was closed, on our side.
_OURS = ("Locally cancelled", "Channel closed")

_DETAILS_KEY = "grpc-status-details-bin"

_BY_STATUS: dict[str, type[HmaError]] = {}
for _kind in ERRORS.values():
    _BY_STATUS.setdefault(_kind.grpc_status, _kind)


class _Failed(Protocol):
    """What the errors of `grpc` and `grpc.aio` have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def typed_error(failure: grpc.RpcError, *, address: str, timeout: float | None) -> HmaError:
    """The typed error behind a failed call.

    Args:
        failure: What gRPC raised.
        address: Whom the call went to; named when it could not be reached.
        timeout: The request's time in seconds, named when it is up.
    """
    failed = cast(_Failed, failure)
    detail = _error_detail(failed.trailing_metadata() or ())
    if detail is not None:
        retry_after = detail.retry_after_seconds if detail.HasField("retry_after_seconds") else None
        return ERRORS.get(detail.code, Internal)(detail.message, field=detail.field, retry_after=retry_after)
    status, text = failed.code().name, failed.details() or failed.code().name
    kind = _BY_STATUS.get(status, Internal)
    if kind is DeadlineExceeded:
        within = "in time" if timeout is None else f"within the timeout of {timeout:g} seconds"
        return DeadlineExceeded(f"the answer was not complete {within}", field="timeout")
    if kind is Unavailable:
        return Unavailable(f"no connection to {address}: {text}", field="address")
    if kind is Cancelled and any(sign in text for sign in _OURS):
        return Cancelled(f"the call was cancelled: {text}")
    if kind is Cancelled:
        # A router that stops does this to a call that reaches it in that very moment.
        return Unavailable(f"{address} ended the call: {text}", field="address")
    return kind(f"{address} answered: {text}")


def _error_detail(metadata: Iterable[tuple[str, str | bytes]]) -> common_pb2.ErrorDetail | None:
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return _first_detail(status_pb2.StatusDetails.FromString(value))
            except DecodeError:
                return None
    return None


def _first_detail(status: status_pb2.StatusDetails) -> common_pb2.ErrorDetail | None:
    for packed in status.details:
        detail = common_pb2.ErrorDetail()
        if packed.Is(detail.DESCRIPTOR) and packed.Unpack(detail):
            return detail
    return None
