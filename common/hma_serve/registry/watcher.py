"""Follows the fleet: list, mark as listed, then watch. One per process, never one per request.

A thread of its own, with synchronous gRPC, for the same reason as in `Session`. It delivers immutable snapshots. While
the store is away the last known fleet stays and says since when it is stale. A watch resumes after the last event; when
the store has forgotten those revisions, or on any doubt, it lists again, and a listing replaces everything: keys that
vanished meanwhile vanish here. It also lists again every few minutes, because servers with watch bugs are in use.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from hma_serve.core.errors import HmaError, InvalidArgument, Unavailable
from hma_serve.core.worker import WorkerInfo, WorkerRole
from hma_serve.registry.backoff import Backoff
from hma_serve.registry.fleet import FleetRecords, FleetSnapshot
from hma_serve.registry.records import decode_record, record_key, role_prefix
from hma_serve.registry.store import Batch, Compacted, Entry, ReadableStore, WatchStream

logger = logging.getLogger(__name__)

LIST_TIMEOUT = 5.0


class Watcher:
    """See the module.

    Args:
        store: Outlives the watcher; the caller closes it.
        role: Only this one; None for both.
        relist: Seconds after which the fleet is listed again although nothing seems wrong.
        clock: Monotonic seconds.
        jitter: Draws from [0, 1).
    """

    def __init__(
        self,
        store: ReadableStore,
        *,
        role: WorkerRole | None = None,
        relist: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._prefix, self._relist = store, role_prefix(role), relist
        self._clock, self._jitter = clock, jitter
        self._backoff = Backoff(0.1, 1.0, jitter)
        self._records = FleetRecords()
        self._resume: int | None = None
        self._list_at = 0.0
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self._closing = threading.Event()
        self._listed = threading.Event()
        self._current = FleetSnapshot(stale_since=clock())
        self._subscribers: list[_Subscriber] = []
        self._thread = threading.Thread(target=self._run, name="registry-watcher", daemon=True)

    @property
    def current(self) -> FleetSnapshot:
        """The newest snapshot."""
        return self._current

    def start(self) -> None:
        """Starts to follow, and returns at once."""
        self._thread.start()

    def subscribe(
        self, callback: Callable[[FleetSnapshot], None], loop: asyncio.AbstractEventLoop | None = None
    ) -> Callable[[], None]:
        """Calls back with the present snapshot, then with the newest one after each change.

        Args:
            callback: Must not block. With a loop it runs there, at most once for all changes that came meanwhile;
                without one it runs on the watcher's thread (and now, on the caller's).
            loop: Where to call back.

        Returns:
            Ends the subscription; idempotent. With a loop call it there: no call follows it.
        """
        subscriber = _Subscriber(self, callback, loop)
        with self._lock:
            self._subscribers.append(subscriber)
        subscriber.notify()

        def unsubscribe() -> None:
            subscriber.active = False
            with self._lock:
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)

        return unsubscribe

    async def wait_listed(self, timeout: float) -> FleetSnapshot:
        """The first snapshot that was read from the registry.

        Raises:
            Unavailable: There is none within `timeout` seconds.
        """
        listed: asyncio.Future[FleetSnapshot] = asyncio.get_running_loop().create_future()

        def seen(snapshot: FleetSnapshot) -> None:
            if snapshot.listed and not listed.done():
                listed.set_result(snapshot)

        unsubscribe = self.subscribe(seen, asyncio.get_running_loop())
        try:
            async with asyncio.timeout(timeout):
                return await listed
        except TimeoutError:
            raise _not_listed(timeout) from None
        finally:
            unsubscribe()

    def wait_listed_blocking(self, timeout: float) -> FleetSnapshot:
        """`wait_listed` where there is no event loop."""
        if not self._listed.wait(timeout):
            raise _not_listed(timeout)
        return self._current

    def close(self, timeout: float = 5.0) -> None:
        """Cancels the watch, then ends the thread, waiting for that at most `timeout` seconds; idempotent."""
        with self._lock:
            self._closing.set()
            stream = self._stream
        if stream is not None:
            stream.close()
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

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                if self._resume is None:
                    self._list()
                self._follow()
            except Compacted as error:
                logger.info("listing the fleet again: %s", error)
                self._resume = None
                # Not to hammer a store that is compacted as fast as we list.
                self._closing.wait(self._backoff.next())
            except HmaError as error:
                self._lost(error)
            except Exception:
                # Nobody joins this thread before the end: a defect must not freeze the fleet for good.
                logger.exception("following the fleet failed unexpectedly")
                self._resume = None
                self._closing.wait(self._backoff.next())

    def _list(self) -> None:
        listing = self._store.list(self._prefix, LIST_TIMEOUT)
        for key in self._records.keys() - {entry.key for entry in listing.entries}:
            self._records.remove(key)
        for entry in listing.entries:
            self._records.put(entry.key, _read(entry))
        self._resume = listing.revision + 1
        self._list_at = self._clock() + self._relist * (0.5 + 0.5 * self._jitter())
        self._backoff.reset()
        self._publish(self._records.snapshot(listing.revision, None))
        self._listed.set()

    def _follow(self) -> None:
        """One watch, until it fails, the watcher closes or it is time to list again."""
        with self._open() as stream:
            for batch in stream:
                self._apply(batch)
                self._backoff.reset()
                if self._closing.is_set():
                    return
                if self._clock() >= self._list_at:
                    self._resume = None
                    return

    def _open(self) -> WatchStream:
        assert self._resume is not None
        stream = self._store.watch(self._prefix, self._resume)
        with self._lock:
            self._stream = stream
            closing = self._closing.is_set()
        if closing:
            stream.close()
        return stream

    def _apply(self, batch: Batch) -> None:
        for event in batch.events:
            if event.entry is None:
                self._records.remove(event.key)
            else:
                self._records.put(event.key, _read(event.entry))
        self._resume = batch.resume or self._resume
        if batch.events or self._current.stale_since is not None:
            self._publish(self._records.snapshot((self._resume or 1) - 1, None))

    def _lost(self, error: HmaError) -> None:
        if not isinstance(error, Unavailable):
            # Not a matter of reaching the store: what we resume from may be what is wrong.
            self._resume = None
        if self._closing.is_set():
            return
        if self._current.stale_since is None:
            logger.warning("the fleet is stale: %s", error)
            self._publish(replace(self._current, stale_since=self._clock()))
        self._closing.wait(self._backoff.next())

    def _publish(self, snapshot: FleetSnapshot) -> None:
        self._current = snapshot
        with self._lock:
            subscribers = tuple(self._subscribers)
        for subscriber in subscribers:
            subscriber.notify()


class _Subscriber:
    """A callback and, where it has a loop, at most one call of it under way there."""

    def __init__(
        self, watcher: Watcher, callback: Callable[[FleetSnapshot], None], loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self._watcher, self._callback, self._loop = watcher, callback, loop
        self._scheduled = False
        self._lock = threading.Lock()
        self.active = True

    def notify(self) -> None:
        if self._loop is None:
            self._call()
            return
        with self._lock:
            if self._scheduled or not self.active:
                return
            self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._call)
        except RuntimeError:
            # The loop is closed: nobody is left to tell.
            self.active = False

    def _call(self) -> None:
        with self._lock:
            # Before the snapshot is read, so that a later one schedules another call.
            self._scheduled = False
        if not self.active:
            return
        try:
            self._callback(self._watcher.current)
        except Exception:
            # A subscriber's defect is not the watch's.
            logger.exception("a subscriber to the fleet failed")


def _read(entry: Entry) -> WorkerInfo | None:
    try:
        info = decode_record(entry.value)
        if record_key(info) != entry.key:
            raise InvalidArgument(f"it names {record_key(info)}")
    except InvalidArgument as error:
        logger.warning("skipping the record at %s: %s", entry.key, error)
        return None
    return info


def _not_listed(timeout: float) -> Unavailable:
    return Unavailable(
        f"the registry did not answer within {timeout:g} s; check --etcd, which takes etcd's client port (2379 as a "
        "rule), and --tls-dir"
    )
