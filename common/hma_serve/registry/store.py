"""What the registry asks of a store: leases, transactions on one key, list, and watch from a revision.

The model is etcd's. A store has a revision that each change raises; a key remembers the revision of its last change
and the lease that it dies with. Every call is synchronous, takes a bound on its duration and makes one attempt: when to
try again is decided by the loops of `Session` and `Watcher`, which own a thread each. A store may be used from several
threads; it is closed after everything that uses it.

Errors: `Unavailable` means that the call may or may not have taken effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from hma_serve.core.errors import FailedPrecondition, NotFound


class LeaseLost(NotFound):
    """The lease has run out or was revoked, and its keys are gone with it."""


class Compacted(FailedPrecondition):
    """The store no longer has (or never had) the changes since the revision asked for: list again."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise to delete keys unless it is renewed.

    Attributes:
        id: Never 0, which stands for no lease.
        ttl: Seconds that the store granted; it may be more than was asked for.
    """

    id: int
    ttl: float


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as the store holds it."""

    key: str
    value: bytes
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys below a prefix as they were at one revision."""

    revision: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """A change of one key; `entry` is None when the key was deleted."""

    key: str
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What a watch delivers at a time.

    Attributes:
        events: In the order of their revisions; empty when the store only shows that it is alive.
        resume: The revision to watch from after this batch, or None when that has not moved.
    """

    events: tuple[Event, ...] = ()
    resume: int | None = None


class WatchStream(Protocol):
    """The changes below a prefix. Close it (or leave its `with` block) in any case."""

    def __iter__(self) -> Iterator[Batch]:
        """Blocks for the next batch, at most for the silence that the store tolerates; ends after `close`.

        Raises:
            Compacted: List again.
            Unavailable: Watch again from the last `resume`.
        """

    def close(self) -> None:
        """Ends the iteration, from any thread; idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ReadableStore(Protocol):
    """The half that routers need."""

    def check(self, timeout: float) -> None:
        """Returns if the store answers.

        Raises:
            Unavailable: It does not; the sentence says where it was looked for.
        """

    def get(self, key: str, timeout: float) -> Entry | None:
        """The newest state of a key (linearizable), or None when it is absent."""

    def list(self, prefix: str, timeout: float) -> Listing:
        """The newest state of all keys below a prefix (linearizable), ordered by key."""

    def watch(self, prefix: str, start_revision: int) -> WatchStream:
        """The changes below a prefix from a revision (inclusive) on. Nothing is sent before the iteration starts."""

    def close(self) -> None:
        """Frees what the store holds; idempotent."""


class Store(ReadableStore, Protocol):
    """The whole of it, which workers need."""

    def grant(self, ttl: float, timeout: float) -> Lease:
        """A new lease of about `ttl` seconds."""

    def keep_alive(self, lease: int, timeout: float) -> float:
        """Renews a lease; returns the seconds granted.

        Raises:
            LeaseLost: It is gone.
        """

    def revoke(self, lease: int, timeout: float) -> None:
        """Ends a lease and deletes its keys; one that is gone already is no error."""

    def create(self, key: str, value: bytes, lease: int, timeout: float) -> int:
        """Writes a key that must not exist, to die with the lease; returns its mod_revision.

        Raises:
            AlreadyExists: The key exists.
            LeaseLost: The lease is gone.
        """

    def replace(self, key: str, value: bytes, lease: int, mod_revision: int, timeout: float) -> int:
        """Writes a key whose last change must be `mod_revision`; returns the new one.

        Raises:
            FailedPrecondition: The key has changed since, or is gone.
            LeaseLost: The lease is gone.
        """
