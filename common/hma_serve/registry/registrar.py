"""Keeps one instance registered: the decisions of `Session`, without its thread.

`step` compares what should be in the registry with what is known to be there, does what is due (a lease, a renewal, a
write) and says how long nothing else is. Rules that it keeps:

- A lease counts from the moment its request was *sent*, so this side never believes in it longer than the store does.
- It is renewed after a third of the time that the store granted, by attempts that each take well below what remains.
- Losing it ends the registration, not the process: the next step takes a new lease and registers under a raised epoch.
- A write whose answer was lost may have happened: the next step reads before it writes.
- A key that vanished or changed behind our back is put right at the next verification, one TTL later at most.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from hma_serve.core.errors import AlreadyExists, HmaError
from hma_serve.core.worker import WorkerInfo
from hma_serve.registry.backoff import Backoff
from hma_serve.registry.records import encode_record
from hma_serve.registry.store import Entry, Lease, LeaseLost, Store

logger = logging.getLogger(__name__)

_PAST_LEASES = 8


class SessionState(StrEnum):
    """Where a registration stands."""

    STARTING = "starting"
    """Never registered so far."""
    REGISTERED = "registered"
    RETRYING = "retrying"
    """Registered, and the lease has time left, but the store does not answer."""
    LOST = "lost"
    """The lease has run out; registering again as soon as the store answers."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step came to.

    Attributes:
        state: After it.
        wait: Seconds until the next step is due.
        published: Whether the wanted record is in the registry.
        error: Why not, for people; empty when all is well.
    """

    state: SessionState
    wait: float
    published: bool
    error: str


class Registrar:
    """Owned by one thread.

    Args:
        store: Where to register.
        key: The instance's key.
        ttl: Seconds of lease to ask for.
        clock: Monotonic seconds.
        jitter: Draws from [0, 1).
    """

    def __init__(
        self, store: Store, key: str, ttl: float, clock: Callable[[], float], jitter: Callable[[], float]
    ) -> None:
        self._store, self._key, self._ttl, self._clock, self._jitter = store, key, ttl, clock, jitter
        self._backoff = Backoff(0.1, min(2.0, ttl / 5), jitter)
        self._lease: Lease | None = None
        self._past: deque[int] = deque(maxlen=_PAST_LEASES)
        self._renew_at = self._expires_at = self._verify_at = 0.0
        self._stored: Entry | None = None  # what is known to be in the registry; None: unknown
        self._written = False  # under the present epoch
        self._registered_before = False
        self.epoch = 0

    @property
    def expires_at(self) -> float:
        """When the newest lease ends if nothing renews it, on the clock."""
        return self._expires_at

    def step(self, wanted: WorkerInfo) -> Step:
        """Does what is due; makes at most four calls to the store and never raises for the store's sake."""
        try:
            self._advance(wanted)
        except HmaError as error:
            return self._failed(error)
        self._backoff.reset()
        due = min(self._renew_at, self._verify_at)
        return Step(SessionState.REGISTERED, max(0.0, due - self._clock()), published=True, error="")

    def revoke(self) -> None:
        """Ends the registration; best effort, the lease ends it otherwise."""
        lease, self._lease, self._stored = self._lease, None, None
        if lease is None:
            return
        try:
            self._store.revoke(lease.id, min(self._ttl / 3, 1.0))
        except HmaError as error:
            logger.warning("could not revoke the lease of %s, it will run out: %s", self._key, error)

    def _advance(self, wanted: WorkerInfo) -> None:
        lease = self._lease
        if lease is None:
            lease = self._take_lease()
        elif self._clock() >= self._renew_at:
            self._renew(lease)
        if self._stored is None or self._clock() >= self._verify_at:
            self._stored = self._read_own(lease)
            self._verify_at = self._clock() + lease.ttl
        value = self._value(wanted)
        if self._stored is None or (self._stored.value, self._stored.lease) != (value, lease.id):
            self._write(self._stored, wanted, lease)
        self._written = self._registered_before = True

    def _take_lease(self) -> Lease:
        sent = self._clock()
        self._lease = lease = self._store.grant(self._ttl, self._ttl / 3)
        self.epoch += 1
        self._written = False
        self._granted(sent, lease.ttl)
        return lease

    def _renew(self, lease: Lease) -> None:
        sent = self._clock()
        self._granted(sent, self._store.keep_alive(lease.id, self._attempt()))

    def _granted(self, sent: float, ttl: float) -> None:
        self._expires_at = sent + ttl
        self._renew_at = sent + ttl / 3 * (0.9 + 0.1 * self._jitter())

    def _read_own(self, lease: Lease) -> Entry | None:
        found = self._store.get(self._key, self._attempt())
        if found is None and self._written:
            # Deleted behind our back, so routers have forgotten this epoch.
            self.epoch += 1
            self._written = False
        if found is not None and found.lease != lease.id and found.lease not in self._past:
            raise AlreadyExists(f"{self._key} belongs to somebody else")
        return found

    def _write(self, stored: Entry | None, wanted: WorkerInfo, lease: Lease) -> None:
        value = self._value(wanted)
        self._stored = None
        if stored is None:
            revision = self._store.create(self._key, value, lease.id, self._attempt())
        else:
            revision = self._store.replace(self._key, value, lease.id, stored.mod_revision, self._attempt())
        self._stored = Entry(self._key, value, revision, lease.id)

    def _value(self, wanted: WorkerInfo) -> bytes:
        return encode_record(replace(wanted, epoch=self.epoch))

    def _attempt(self) -> float:
        """Seconds for one call: a third of what remains of the lease, so that another attempt still fits."""
        most, remaining = self._ttl / 3, self._expires_at - self._clock()
        return most if remaining <= 0 else min(most, max(remaining / 3, most / 10))

    def _failed(self, error: HmaError) -> Step:
        if isinstance(error, LeaseLost) and self._lease is not None:
            self._past.append(self._lease.id)
            self._lease = self._stored = None
        state, wait = self._state(), self._backoff.next()
        if state is SessionState.RETRYING:
            # Not to sleep over the moment when it is lost.
            wait = min(wait, max(0.0, self._expires_at - self._clock()))
        return Step(state, wait, published=False, error=str(error))

    def _state(self) -> SessionState:
        if not self._registered_before:
            return SessionState.STARTING
        if self._lease is None or not self._written or self._clock() >= self._expires_at:
            return SessionState.LOST
        return SessionState.RETRYING
