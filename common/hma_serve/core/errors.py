"""The one table of failures: every error the product raises on purpose, with its gRPC and HTTP status.

Code raises these types; `rpc` and the HTTP gateway translate them at the edge by looking at `code`, `grpc_status` and
`http_status` alone. A failure that is none of these is a bug and is reported as `internal` without its text.
"""

from __future__ import annotations

from typing import ClassVar


class HmaError(Exception):
    """Base of all deliberate failures.

    Attributes:
        code: Stable name, carried on the wire in `ErrorDetail.code`.
        grpc_status: Name of the `grpc.StatusCode`.
        http_status: Status of the HTTP gateway.
        message: What happened and what to do about it; shown to the caller.
        field: The request field or command-line flag at fault, if one is.
        retry_after: Seconds after which a retry makes sense, if it does.
    """

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class Internal(HmaError):
    """A broken invariant of ours."""


class InvalidArgument(HmaError):
    """The request itself is wrong; repeating it cannot help."""

    code = "invalid_argument"
    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class ContextLengthExceeded(InvalidArgument):
    """Prompt plus completion do not fit the model's window."""

    code = "context_length_exceeded"


class PayloadTooLarge(HmaError):
    """A body or message above the documented limit."""

    code = "payload_too_large"
    grpc_status = "INVALID_ARGUMENT"
    http_status = 413


class Unauthenticated(HmaError):
    """No valid credentials."""

    code = "unauthenticated"
    grpc_status = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(HmaError):
    """The caller is known but may not do this."""

    code = "permission_denied"
    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class NotFound(HmaError):
    """The named thing (model, ticket, file) does not exist."""

    code = "not_found"
    grpc_status = "NOT_FOUND"
    http_status = 404


class AlreadyExists(HmaError):
    """The name is taken."""

    code = "already_exists"
    grpc_status = "ALREADY_EXISTS"
    http_status = 409


class FailedPrecondition(HmaError):
    """Right in itself, but not in this state: an incompatible pair, a stale epoch, a profile that does not fit."""

    code = "failed_precondition"
    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class DataLoss(HmaError):
    """Bytes arrived damaged: checksum, truncation, a banned code."""

    code = "data_loss"
    grpc_status = "DATA_LOSS"
    http_status = 502


class ResourceExhausted(HmaError):
    """Overload: shed now, welcome later."""

    code = "resource_exhausted"
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429


class Unavailable(HmaError):
    """Nobody can serve this now: no compatible worker, a lost peer, draining."""

    code = "unavailable"
    grpc_status = "UNAVAILABLE"
    http_status = 503


class DeadlineExceeded(HmaError):
    """The request's time is up."""

    code = "deadline_exceeded"
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(HmaError):
    """The caller went away. 499 is nginx's status for it; nobody is there to read it."""

    code = "cancelled"
    grpc_status = "CANCELLED"
    http_status = 499


ERRORS: dict[str, type[HmaError]] = {
    kind.code: kind
    for kind in (
        Internal,
        InvalidArgument,
        ContextLengthExceeded,
        PayloadTooLarge,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        DataLoss,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
    )
}
"""Every error by its code, for the way back from the wire."""
