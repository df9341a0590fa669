"""What a failed call means to the caller."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from hma_serve.client._failures import typed_error
from hma_serve.core.errors import Cancelled, HmaError, Internal, Unavailable


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[Any, ...]:
        return ()


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        # A router that stops cancels what reaches it in that moment: another one can take it.
        (grpc.StatusCode.CANCELLED, "CANCELLED", Unavailable),
        (grpc.StatusCode.CANCELLED, None, Unavailable),
        (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", Cancelled),
        (grpc.StatusCode.CANCELLED, "Stream removed (Channel closed!)", Cancelled),
        (grpc.StatusCode.UNAVAILABLE, "connection refused", Unavailable),
        (grpc.StatusCode.UNKNOWN, "?", Internal),
    ],
)
def test_failures_of_grpc_itself(code: grpc.StatusCode, details: str | None, kind: type[HmaError]) -> None:
    error = typed_error(cast(Any, Failure(code, details)), address="router:1", timeout=None)
    assert type(error) is kind
