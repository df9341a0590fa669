"""The fleet as a router sees it at one moment: immutable, so that a decision is a pure function of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hma_serve.core.worker import WorkerInfo, WorkerRole


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """What the registry holds.

    Attributes:
        workers: Prefill and decode, by instance.
        routers: Likewise; nothing is placed on them.
        revision: The store's, that this is at least as new as; 0 before the first list.
        listed: Whether the registry was read at all: before that, "no worker" means "not known yet".
        stale_since: When the registry stopped answering, monotonic seconds; None while it does. The workers stay: what
            is left to tell the living from the dead is the data plane.
        bad_records: Records that could not be read and are left out.
    """

    workers: Mapping[str, WorkerInfo] = field(default_factory=lambda: MappingProxyType({}))
    routers: Mapping[str, WorkerInfo] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    listed: bool = False
    stale_since: float | None = None
    bad_records: int = 0

    def with_role(self, role: WorkerRole) -> tuple[WorkerInfo, ...]:
        """The workers of one role, ordered by instance."""
        return tuple(self.workers[name] for name in sorted(self.workers) if self.workers[name].role is role)


class FleetRecords:
    """The mutable side, owned by the watcher's thread: records by key, good ones and bad ones."""

    def __init__(self) -> None:
        self._good: dict[str, WorkerInfo] = {}
        self._bad: set[str] = set()

    def put(self, key: str, info: WorkerInfo | None) -> None:
        """Sets a key's record; None marks one that cannot be read, which is not routable whatever it was before."""
        self.remove(key)
        if info is None:
            self._bad.add(key)
        else:
            self._good[key] = info

    def remove(self, key: str) -> None:
        """Forgets a key."""
        self._good.pop(key, None)
        self._bad.discard(key)

    def keys(self) -> set[str]:
        """All keys."""
        return self._good.keys() | self._bad

    def snapshot(self, revision: int, stale_since: float | None) -> FleetSnapshot:
        """A copy that later changes leave alone."""
        workers: dict[str, WorkerInfo] = {}
        routers: dict[str, WorkerInfo] = {}
        for info in self._good.values():
            (routers if info.role is WorkerRole.ROUTER else workers)[info.instance] = info
        return FleetSnapshot(
            workers=MappingProxyType(workers),
            routers=MappingProxyType(routers),
            revision=revision,
            listed=True,
            stale_since=stale_since,
            bad_records=len(self._bad),
        )
