"""What a decode worker reports of its engine."""

from hma_serve.decode.load import Load
from hma_serve.internal.v1.decode_engine_pb2 import DecodeEngineLoad


def test_an_engine_is_silent_only_while_it_has_something_to_say() -> None:
    now = 100.0
    load = Load(lambda: now)
    assert load.snapshot().engine_silent_seconds == 0
    load.engine_said(DecodeEngineLoad(running=1))
    now += 4
    assert load.snapshot().engine_silent_seconds == 4
    load.engine_said(DecodeEngineLoad(running=1))
    assert load.snapshot().engine_silent_seconds == 0
    load.engine_said(DecodeEngineLoad(waiting=1))
    now += 4
    assert load.snapshot().engine_silent_seconds == 0
