"""The registry's store inside one process: for tests, simulation and the static file's diffs.

It keeps etcd's manners, lease expiry included, and passes the same contract tests. There is no thread: leases expire
when somebody looks, and a watch looks at the moment when the next one is due.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hma_serve.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from hma_serve.registry.store import Batch, Compacted, Entry, Event, Lease, LeaseLost, Listing

HISTORY = 10_000
"""Changes that a watch can resume over; older ones count as compacted."""


@dataclass(slots=True)
class _Term:
    ttl: float
    expires_at: float


class MemoryStore:
    """`Store` in memory. Safe to use from several threads.

    Args:
        clock: Monotonic seconds; leases run on it.
        pulse: Real seconds between a watch's signs of life.
        min_ttl: Seconds that a lease lasts at least, as servers have it.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, pulse: float = 1.5, min_ttl: float = 0.0
    ) -> None:
        self._clock, self._pulse, self._min_ttl = clock, pulse, min_ttl
        self._changed = threading.Condition(threading.RLock())
        self._revision = 1
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Term] = {}
        self._last_lease = 0
        self._history: deque[tuple[int, Event]] = deque(maxlen=HISTORY)
        self._compacted = 0
        self._closed = False

    def check(self, timeout: float) -> None:
        """See `ReadableStore`."""
        with self._changed:
            self._settle()

    def get(self, key: str, timeout: float) -> Entry | None:
        """See `ReadableStore`."""
        with self._changed:
            self._settle()
            return self._entries.get(key)

    def list(self, prefix: str, timeout: float) -> Listing:
        """See `ReadableStore`."""
        with self._changed:
            self._settle()
            found = (self._entries[key] for key in sorted(self._entries) if key.startswith(prefix))
            return Listing(self._revision, tuple(found))

    def watch(self, prefix: str, start_revision: int) -> MemoryWatch:
        """See `ReadableStore`."""
        return MemoryWatch(self, prefix, start_revision)

    def grant(self, ttl: float, timeout: float) -> Lease:
        """See `Store`."""
        with self._changed:
            self._settle()
            self._last_lease += 1
            ttl = max(ttl, self._min_ttl)
            self._leases[self._last_lease] = _Term(ttl, self._clock() + ttl)
            # A sleeping watch may have to wake earlier than it planned.
            self._changed.notify_all()
            return Lease(self._last_lease, ttl)

    def keep_alive(self, lease: int, timeout: float) -> float:
        """See `Store`."""
        with self._changed:
            term = self._term(lease)
            term.expires_at = self._clock() + term.ttl
            return term.ttl

    def revoke(self, lease: int, timeout: float) -> None:
        """See `Store`."""
        with self._changed:
            self._settle()
            self._end_lease(lease)

    def create(self, key: str, value: bytes, lease: int, timeout: float) -> int:
        """See `Store`."""
        with self._changed:
            self._term(lease)
            if key in self._entries:
                raise AlreadyExists(f"{key} is registered already")
            return self.put(key, value, lease)

    def replace(self, key: str, value: bytes, lease: int, mod_revision: int, timeout: float) -> int:
        """See `Store`."""
        with self._changed:
            self._term(lease)
            entry = self._entries.get(key)
            if entry is None or entry.mod_revision != mod_revision:
                raise FailedPrecondition(f"{key} has changed since revision {mod_revision}")
            return self.put(key, value, lease)

    def close(self) -> None:
        """See `ReadableStore`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Writes a key without any condition, as an operator might; returns its mod_revision."""
        with self._changed:
            self._settle()
            self._revision += 1
            entry = self._entries[key] = Entry(key, value, self._revision, lease)
            self._record(Event(key, entry))
            return self._revision

    def delete(self, key: str) -> None:
        """Deletes a key if it is there."""
        with self._changed:
            self._settle()
            if key in self._entries:
                self._revision += 1
                self._remove(key)

    def compact(self) -> None:
        """Forgets the history; a watch from an older revision than the present one is refused."""
        with self._changed:
            self._history.clear()
            self._compacted = self._revision

    def next_batch(self, prefix: str, start: int, closed: Callable[[], bool]) -> Batch | None:
        """Blocks for changes from `start` on, at most for a pulse; None when closed. Raises like `WatchStream`."""
        with self._changed:
            waited = False
            while not closed():
                self._settle()
                if start <= self._compacted:
                    raise Compacted(f"the store is compacted up to revision {self._compacted}")
                if start <= self._revision:
                    # A revision is written and read under the lock, so it is never delivered in part.
                    events = (event for at, event in self._history if at >= start and event.key.startswith(prefix))
                    return Batch(tuple(events), self._revision + 1)
                if waited:
                    return Batch()
                waited = True
                self._changed.wait(self._nap())
            return None

    def wake(self) -> None:
        """Lets waiting watches look around."""
        with self._changed:
            self._changed.notify_all()

    def _settle(self) -> None:
        if self._closed:
            raise Unavailable("the registry's store is closed")
        now = self._clock()
        for lease in [lease for lease, term in self._leases.items() if term.expires_at <= now]:
            self._end_lease(lease)

    def _nap(self) -> float:
        now = self._clock()
        return max(0.0, min([self._pulse, *(term.expires_at - now for term in self._leases.values())]))

    def _term(self, lease: int) -> _Term:
        self._settle()
        try:
            return self._leases[lease]
        except KeyError:
            raise LeaseLost("the lease has run out") from None

    def _end_lease(self, lease: int) -> None:
        if self._leases.pop(lease, None) is None:
            return
        keys = [entry.key for entry in self._entries.values() if entry.lease == lease]
        self._revision += bool(keys)
        for key in keys:
            self._remove(key)

    def _remove(self, key: str) -> None:
        del self._entries[key]
        self._record(Event(key, None))

    def _record(self, event: Event) -> None:
        if len(self._history) == HISTORY:
            self._compacted = self._history[0][0]
        self._history.append((self._revision, event))
        self._changed.notify_all()


class MemoryWatch:
    """`WatchStream` of a `MemoryStore`."""

    def __init__(self, store: MemoryStore, prefix: str, start_revision: int) -> None:
        self._store, self._prefix, self._next = store, prefix, start_revision
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        """See `WatchStream`."""
        while (batch := self._store.next_batch(self._prefix, self._next, self._closed.is_set)) is not None:
            self._next = batch.resume or self._next
            yield batch

    def close(self) -> None:
        """See `WatchStream`."""
        self._closed.set()
        self._store.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
