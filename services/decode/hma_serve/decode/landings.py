"""What has arrived of each ticket's KV stream, kept over a lost connection so that the producer can go on.

The blocks themselves are in their pages; here is what checking the next one needs: how many came and which units they
cover. A landing is held by one call at a time. When that call is lost, the next one that says `resume` takes it over,
also from a call that does not know yet that its producer is gone. Nobody's is dropped after a ticket's lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from hma_serve.core.errors import FailedPrecondition, HmaError, Unavailable
from hma_serve.kvblock import StreamPlan, StreamReader
from hma_serve.v1 import kv_transfer_pb2

_Key = tuple[bytes, int]


@dataclass(eq=False)
class Landing:
    """One stream's progress.

    Attributes:
        key: Ticket and attempt.
        manifest: Digest of what it was announced as.
        reader: Checks the next block; gone once it is whole.
        committed: What was said when it was whole, to be said again.
        evict: Ends the call that holds it.
        left: Set while no call holds it.
        expiry: Runs while no call holds it.
    """

    key: _Key
    manifest: bytes
    reader: StreamReader | None
    committed: kv_transfer_pb2.PushCommitted | None = None
    evict: Callable[[HmaError], None] | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None

    def commit(self, *, blocks: int, payload_bytes: int) -> kv_transfer_pb2.PushCommitted:
        """It is whole: little of it needs to be remembered."""
        self.reader = None
        self.committed = kv_transfer_pb2.PushCommitted(blocks=blocks, payload_bytes=payload_bytes)
        return self.committed


class Landings:
    """All streams of one receiver; confined to one event loop.

    Args:
        keep: Seconds that a landing without a call is kept.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._landings: dict[_Key, Landing] = {}

    def __len__(self) -> int:
        return len(self._landings)

    async def take_over(self, opened: kv_transfer_pb2.PushOpen) -> Landing | None:
        """The landing of a stream that goes on, free to be held; None: nothing of it is known.

        Raises:
            FailedPrecondition: It was announced as something else.
        """
        landing = self._landings.get(_key(opened))
        if landing is None:
            return None
        if landing.manifest != _digest(opened):
            raise FailedPrecondition("a resumed stream must have the manifest that it began with", field="manifest")
        while landing.evict is not None:
            landing.evict(Unavailable("the producer goes on in a newer call"))
            await landing.left.wait()
        return landing

    @staticmethod
    def begin(opened: kv_transfer_pb2.PushOpen, plan: StreamPlan) -> Landing:
        """A landing of a new stream; it counts once it is held."""
        return Landing(_key(opened), _digest(opened), StreamReader(plan, opened.ticket, opened.epoch))

    def hold(self, landing: Landing, evict: Callable[[HmaError], None]) -> None:
        """Says that a call works on it from now on; pair with `leave`."""
        if landing.expiry is not None:
            landing.expiry.cancel()
        landing.evict, landing.expiry = evict, None
        landing.left.clear()
        self._landings[landing.key] = landing

    def leave(self, landing: Landing, *, keep: bool) -> None:
        """Ends a call's hold; `keep` it for a call that goes on. Idempotent."""
        landing.evict = None
        landing.left.set()
        if self._landings.get(landing.key) is not landing:
            return
        if keep and landing.expiry is None:
            landing.expiry = asyncio.get_running_loop().call_later(self._keep, self._drop, landing)
        elif not keep:
            self._drop(landing)

    def _drop(self, landing: Landing) -> None:
        if self._landings.get(landing.key) is landing:
            del self._landings[landing.key]


def _key(opened: kv_transfer_pb2.PushOpen) -> _Key:
    return opened.ticket, opened.epoch


def _digest(opened: kv_transfer_pb2.PushOpen) -> bytes:
    return sha256(opened.manifest.SerializeToString(deterministic=True)).digest()
