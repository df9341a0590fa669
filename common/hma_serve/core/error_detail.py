"""Typed errors as messages and back: one form between services and between the two processes of a worker.

It lies here, and not beside the gRPC statuses that carry it, because engines speak of errors and know nothing of gRPC.
"""

from __future__ import annotations

from hma_serve.core.errors import ERRORS, HmaError, Internal
from hma_serve.v1 import common_pb2

# A text may quote its cause; the cause's length is not ours to choose.
_MAX_TEXT = 2000


def error_detail(error: HmaError) -> common_pb2.ErrorDetail:
    """The error as a message; a text beyond 2,000 characters is cut."""
    return common_pb2.ErrorDetail(
        code=error.code,
        message=error.message[:_MAX_TEXT],
        field=error.field,
        retry_after_seconds=error.retry_after,
    )


def from_error_detail(detail: common_pb2.ErrorDetail) -> HmaError:
    """The typed error of a message; codes of newer versions become Internal."""
    retry_after = detail.retry_after_seconds if detail.HasField("retry_after_seconds") else None
    return ERRORS.get(detail.code, Internal)(detail.message, field=detail.field, retry_after=retry_after)
