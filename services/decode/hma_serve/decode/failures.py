"""Typed errors on the way between the two processes; the engine has no gRPC, so this does without it."""

from __future__ import annotations

from hma_serve.core.errors import ERRORS, HmaError, Internal
from hma_serve.v1 import common_pb2


def to_detail(error: HmaError) -> common_pb2.ErrorDetail:
    """The error as a message."""
    return common_pb2.ErrorDetail(
        code=error.code, message=error.message, field=error.field, retry_after_seconds=error.retry_after
    )


def from_detail(detail: common_pb2.ErrorDetail) -> HmaError:
    """The error of a message."""
    retry_after = detail.retry_after_seconds if detail.HasField("retry_after_seconds") else None
    return ERRORS.get(detail.code, Internal)(detail.message, field=detail.field, retry_after=retry_after)
