"""A request's deadline: absolute on the wire, seconds that remain everywhere else."""

from __future__ import annotations

import time

from google.protobuf.timestamp_pb2 import Timestamp

from hma_serve.v1 import common_pb2


def deadline_in(seconds: float) -> Timestamp:
    """The moment `seconds` from now."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int(seconds * 1e9))
    return stamp


def remaining(context: common_pb2.RequestContext) -> float | None:
    """Seconds until the request's deadline (negative once it passed); None without one."""
    if not context.HasField("deadline"):
        return None
    return (context.deadline.ToNanoseconds() - time.time_ns()) / 1e9
