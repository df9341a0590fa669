"""The engine's links: one to its front and one to each receiver, told apart by the numbers of their pushes.

A front dies with its engine and an engine with its front. A receiver that is gone leaves tickets behind that nobody
fills; their leases end them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import groupby

from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.ipc import SyncLink, SyncLinks

_OF_PUSHES = frozenset({"attached", "landed", "committed", "push_failed"})


class EngineLinks:
    """Receives from all, and sends each event to whom it concerns.

    Args:
        front: Its link.
        receivers: Sockets to the receivers, in the order of their places.
    """

    def __init__(self, front: SyncLink[pb.DecodeEngineCommand], receivers: Sequence[socket.socket] = ()) -> None:
        self._links = SyncLinks([front, *(SyncLink(each, pb.DecodeEngineCommand) for each in receivers)])

    def receive(self, timeout: float | None) -> list[pb.DecodeEngineCommand]:
        """See `SyncLinks`."""
        return self._links.receive(timeout)

    def send(self, *events: pb.DecodeEngineEvent) -> None:
        """Sends events, those to one in their order.

        Raises:
            LinkClosed: The front is gone or stuck.
        """
        for place, some in _by_place(events, self._links.count):
            self._links.send(place, *some)


def _by_place(
    events: Sequence[pb.DecodeEngineEvent], places: int
) -> Iterator[tuple[int, Iterator[pb.DecodeEngineEvent]]]:
    if places == 1:
        yield 0, iter(events)
        return

    def place(event: pb.DecodeEngineEvent) -> int:
        kind = event.WhichOneof("event")
        return int(getattr(event, kind).push % places) if kind in _OF_PUSHES else 0

    yield from groupby(sorted(events, key=place), place)
