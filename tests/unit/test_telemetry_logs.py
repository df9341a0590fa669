"""What a service's log holds, and what it leaves out."""

import logging

import pytest

from hma_serve.telemetry.logs import setup_logging


@pytest.fixture(autouse=True)
def root_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)


def test_a_client_that_left_is_no_error_of_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("decode")
    grpcio = logging.getLogger("grpc._cython.cygrpc")
    try:
        raise RuntimeError("in a handler")
    except RuntimeError:
        grpcio.exception("ExecuteBatchError raised in core by servicer method [%s]", "/hma_serve.v1.Decode/Generate")
        grpcio.exception("Unexpected [%s] raised by servicer method [%s]", "RuntimeError", "/x")
    written = capsys.readouterr().err
    assert "ExecuteBatchError" not in written
    assert "Unexpected [RuntimeError] raised by servicer method [/x]\nTraceback" in written
