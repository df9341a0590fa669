"""A request's deadline: seconds that remain.

It travels with the gRPC call, as the seconds that are left, so two hosts' clocks need not agree. A caller may name an
earlier moment in the message as well; that one is only as good as the clocks.
"""

from __future__ import annotations

import time

from hma_serve.v1 import common_pb2


def remaining(context: common_pb2.RequestContext, call_seconds: float | None) -> float | None:
    """Seconds until the request's deadline (negative once it passed); None without one.

    Args:
        context: Of the request.
        call_seconds: Until the deadline of the call that brought it (`ServicerContext.time_remaining`).
    """
    if not context.HasField("deadline"):
        return call_seconds
    named = (context.deadline.ToNanoseconds() - time.time_ns()) / 1e9
    return named if call_seconds is None else min(named, call_seconds)
