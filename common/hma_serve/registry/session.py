"""A worker's registration as a lifetime: `with Session(store, info, ttl=10) as session: ...`.

It renews its lease in a thread of its own with synchronous gRPC, because nothing that a worker's event loop does (or
fails to do for half a minute) may cost it its registration. The thread owns the `Registrar`; everything else here is a
mailbox: `update` leaves the record wanted from now on, `status` and `info` read what the thread last reported.

Every way out: `close` revokes the lease, so that the key vanishes at once; a process that dies loses the key within the
TTL; a lease that runs out because etcd was away is replaced by a new one as soon as etcd answers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.worker import WorkerInfo
from hma_serve.registry.records import record_key
from hma_serve.registry.registrar import Registrar, SessionState, Step
from hma_serve.registry.store import Store

logger = logging.getLogger(__name__)

_CRASH_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """For readiness, metrics and people.

    Attributes:
        state: Where the registration stands.
        since: When that began, monotonic seconds.
        epoch: Of the newest registration; 0 before the first.
        error: Why it is not registered; empty when it is.
    """

    state: SessionState
    since: float
    epoch: int
    error: str = ""

    @property
    def routable(self) -> bool:
        """Whether routers know this instance, as far as one can tell from here."""
        return self.state in (SessionState.REGISTERED, SessionState.RETRYING)


class Session:
    """See the module.

    Args:
        store: Outlives the session; the caller closes it.
        info: The record; its epoch is filled in here.
        ttl: Seconds of lease to ask for.
        on_status: Called on the session's thread when the state, the epoch or whether there is an error changes;
            must not block.
        clock: Monotonic seconds.
        jitter: Draws from [0, 1).

    Raises:
        InvalidArgument: `info` cannot be registered, or the TTL is not positive.
    """

    def __init__(
        self,
        store: Store,
        info: WorkerInfo,
        *,
        ttl: float = 10.0,
        on_status: Callable[[SessionStatus], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if ttl <= 0:
            raise InvalidArgument(f"a lease of {ttl:g} s ends before it begins", field="ttl")
        self._key = record_key(info)
        self._registrar = Registrar(store, self._key, ttl, clock, jitter)
        self._on_status, self._clock = on_status, clock
        self._mail = threading.Condition()
        self._wanted, self._version, self._published_version = info, 1, 0
        self._closing = False
        self._status = SessionStatus(SessionState.STARTING, clock(), 0)
        self._expires_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"registry-session-{info.instance}", daemon=True)

    @property
    def info(self) -> WorkerInfo:
        """The record wanted, with the epoch in force."""
        with self._mail:
            return replace(self._wanted, epoch=self._status.epoch)

    @property
    def status(self) -> SessionStatus:
        """The newest status; the registration counts as lost when the lease has run out and the thread is silent."""
        with self._mail:
            status, expired = self._status, self._clock() - self._expires_at
        if not status.routable or expired < 0:
            return status
        error = f"the lease ran out {expired:.0f} s ago, and the thread that renews it is silent"
        return replace(status, state=SessionState.LOST, error=error)

    def start(self) -> None:
        """Starts to register, and returns at once: an etcd that is away delays the registration, not the process."""
        self._thread.start()

    def update(self, info: WorkerInfo) -> None:
        """Leaves a new record to be written as soon as possible; only the newest one counts.

        Raises:
            InvalidArgument: It is another instance's.
        """
        if record_key(info) != self._key:
            raise InvalidArgument(f"a session of {self._key} cannot register {record_key(info)}")
        with self._mail:
            self._wanted = info
            self._version += 1
            self._mail.notify_all()

    def wait_published(self, timeout: float) -> bool:
        """Blocks until the newest record is in the registry; false when it is not within `timeout` seconds."""
        with self._mail:
            return self._mail.wait_for(self._is_published, timeout)

    async def published(self, timeout: float) -> bool:
        """`wait_published` for an event loop."""
        return await asyncio.to_thread(self.wait_published, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Revokes the lease and ends the thread, waiting for that at most `timeout` seconds; idempotent."""
        with self._mail:
            self._closing = True
            self._mail.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    async def aclose(self, timeout: float = 5.0) -> None:
        """`close` for an event loop."""
        await asyncio.to_thread(self.close, timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _is_published(self) -> bool:
        return self._published_version == self._version and self._status.routable

    def _run(self) -> None:
        while True:
            with self._mail:
                if self._closing:
                    break
                wanted, version = self._wanted, self._version
            step = self._step(wanted)
            self._report(step, version)
            with self._mail:
                if self._version == version and not self._closing:
                    self._mail.wait(step.wait)
        self._registrar.revoke()
        self._report(Step(SessionState.CLOSED, 0.0, published=False, error=""), version=0)

    def _step(self, wanted: WorkerInfo) -> Step:
        try:
            return self._registrar.step(wanted)
        except Exception:
            # Nobody joins this thread before the end: a defect must not silently deregister the worker.
            logger.exception("registering %s failed unexpectedly", self._key)
            return Step(self.status.state, _CRASH_WAIT, published=False, error="internal error, see the log")

    def _report(self, step: Step, version: int) -> None:
        with self._mail:
            before, epoch = self._status, self._registrar.epoch
            since = before.since if before.state is step.state else self._clock()
            self._status = after = SessionStatus(step.state, since, epoch, step.error)
            self._published_version = version if step.published else self._published_version
            self._expires_at = self._registrar.expires_at
            self._mail.notify_all()
        if (before.state, before.epoch, bool(before.error)) == (after.state, after.epoch, bool(after.error)):
            return
        logger.info("%s is %s, epoch %d %s", self._key, after.state, after.epoch, after.error)
        if self._on_status is not None:
            self._on_status(after)
