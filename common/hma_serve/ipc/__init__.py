"""Between a service's front and its engine: shared memory for bytes, a socket for small messages.

Python's interpreter lock decides that a step of a few milliseconds must not share a process with gRPC. Nothing here
pickles; messages are protobuf. The engine dies with its front, and the front learns at once when its engine dies.
"""

from hma_serve.ipc.arena import Arena, SlotPool, SlotStatistics
from hma_serve.ipc.engine_process import (
    EngineEndpoint,
    EngineProcess,
    add_engine_arguments,
    attach_engine,
    inherit,
    spawn_engine,
)
from hma_serve.ipc.link import AsyncLink, LinkClosed, SyncLink, SyncLinks

__all__ = [
    "Arena",
    "AsyncLink",
    "EngineEndpoint",
    "EngineProcess",
    "LinkClosed",
    "SlotPool",
    "SlotStatistics",
    "SyncLink",
    "SyncLinks",
    "add_engine_arguments",
    "attach_engine",
    "inherit",
    "spawn_engine",
]
