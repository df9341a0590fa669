"""A deadline named in the message, as a foreign caller may; the router leaves its own to the call."""

from __future__ import annotations

import time

from google.protobuf.timestamp_pb2 import Timestamp


def deadline_in(seconds: float) -> Timestamp:
    """The moment `seconds` from now."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int(seconds * 1e9))
    return stamp
