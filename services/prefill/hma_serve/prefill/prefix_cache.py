"""Native-codec KV of prompts seen before, in host memory, so that a shared prefix is computed once.

A *page* is one group of 32 tokens, all layers, keys and values, in the bytes that go over the wire. It is found by the
name of the prefix that it ends (`hma_serve.core.prefix`), and is of use only with every page before it, so pages form a
tree: a page is evicted only when nobody uses it and none of its continuations is left, least recently used first.

Ownership of a page: free -> `reserve` (the caller fills it) -> `add` (the cache's, by name) -> evicted -> free. A lease
keeps the pages that a request found or added from being evicted; requests share pages, they never copy them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.prefill.kv_layout import KvLayout


@dataclass(slots=True, eq=False)
class _Entry:
    name: bytes
    page: int
    parent: _Entry | None
    used: int = 0
    leases: int = 0
    continuations: int = 0

    @property
    def evictable(self) -> bool:
        return not self.leases and not self.continuations


@dataclass(slots=True, eq=False)
class Lease:
    """The run of pages, from the prompt's first group on, that one request uses."""

    _entries: list[_Entry] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._entries)

    def pages(self, groups: slice) -> list[int]:
        """The pages of some of its groups."""
        return [entry.page for entry in self._entries[groups]]


class PrefixCache:
    """Pages within a budget; single-threaded.

    Args:
        layout: Of the packed KV.
        budget_bytes: For pages; 0 caches nothing. Untouched memory costs nothing.
    """

    def __init__(self, layout: KvLayout, budget_bytes: int) -> None:
        self._layout = layout
        self.page_bytes = layout.layers * layout.layer_bytes(GROUP_TOKENS)
        self.capacity = budget_bytes // self.page_bytes
        self._memory = np.empty(self.capacity * self.page_bytes, dtype=np.uint8)
        self._roles = _role_views(self._memory, layout, self.capacity)
        self._free = list(range(self.capacity - 1, -1, -1))
        self._entries: dict[bytes, _Entry] = {}
        # Lazily: (last use, number, entry); an entry that was used since, or is in use, is passed over.
        self._eviction: list[tuple[int, int, _Entry]] = []
        self._clock = 0

    @property
    def memory(self) -> memoryview:
        """All of it, for pinning."""
        return self._memory.data

    @property
    def pages(self) -> int:
        """Pages that can be found."""
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        """Memory of the pages that can be found."""
        return len(self._entries) * self.page_bytes

    def lease(self) -> Lease:
        """An empty one; `extend` it, `add` to it, and `release` it."""
        return Lease()

    def extend(self, lease: Lease, names: Sequence[bytes]) -> int:
        """Takes what is cached of the groups that follow the lease's; returns how many that were.

        Args:
            lease: Has the groups before.
            names: Of all groups of the prompt.
        """
        found = 0
        for name in names[len(lease) :]:
            entry = self._entries.get(name)
            if entry is None:
                break
            self._take(lease, entry)
            found += 1
        return found

    def reserve(self, groups: int) -> list[int]:
        """Up to so many pages to fill; fewer when all others are in use."""
        while len(self._free) < groups and self._evict():
            pass
        return [self._free.pop() for _ in range(min(groups, len(self._free)))]

    def give_back(self, pages: Iterable[int]) -> None:
        """Reserved pages that will not be added."""
        self._free.extend(pages)

    def add(self, lease: Lease, names: Sequence[bytes], pages: Iterable[int]) -> None:
        """Makes filled pages findable, and part of the lease.

        Args:
            lease: Has every group before; otherwise the pages would never be found, and are freed.
            names: Of all groups of the prompt.
            pages: Of the groups that follow the lease's. A group that was added meanwhile keeps the page it has.
        """
        for page in pages:
            name = names[len(lease)]
            entry = self._entries.get(name)
            if entry is None:
                parent = lease._entries[-1] if lease._entries else None
                entry = self._entries[name] = _Entry(name, page, parent)
                if parent is not None:
                    parent.continuations += 1
            else:
                self._free.append(page)
            self._take(lease, entry)

    def release(self, lease: Lease) -> None:
        """Its pages may be evicted again, the last one first; idempotent."""
        for entry in reversed(lease._entries):
            entry.leases -= 1
            self._offer(entry)
        lease._entries.clear()

    def load(self, pages: Sequence[int], layer: int, views: Sequence[NDArray[np.uint8]]) -> None:
        """Copies one layer of pages out.

        Args:
            pages: Of consecutive groups.
            layer: Which one.
            views: Per role, [heads, groups, group bytes], written.
        """
        for role, view in zip(self._roles, views, strict=True):
            view.transpose(1, 0, 2)[...] = role[pages, layer]

    def store(self, pages: Sequence[int], layer: int, views: Sequence[NDArray[np.uint8]]) -> None:
        """Copies one layer into reserved pages; arguments as `load`."""
        for role, view in zip(self._roles, views, strict=True):
            role[pages, layer] = view.transpose(1, 0, 2)

    def check_integrity(self) -> None:
        """Proves, while nobody holds reserved pages, that every page is free or found once.

        Raises:
            RuntimeError: It is not so.
        """
        owned = sorted([*self._free, *(entry.page for entry in self._entries.values())])
        if owned != list(range(self.capacity)):
            raise RuntimeError("pages of the prefix cache are lost or owned twice")

    def _take(self, lease: Lease, entry: _Entry) -> None:
        entry.leases += 1
        self._clock += 1
        entry.used = self._clock
        lease._entries.append(entry)

    def _offer(self, entry: _Entry) -> None:
        """Lets an entry be evicted, if nothing speaks against it."""
        if not entry.evictable:
            return
        self._clock += 1
        heapq.heappush(self._eviction, (entry.used, self._clock, entry))
        if len(self._eviction) > 2 * self.capacity:
            # More than half of them are stale.
            current = [item for item in self._eviction if item[0] == item[2].used and item[2].evictable]
            self._eviction = list({id(item[2]): item for item in current}.values())
            heapq.heapify(self._eviction)

    def _evict(self) -> bool:
        """Frees the page that was not used for longest; False when every page is in use."""
        while self._eviction:
            used, _, entry = heapq.heappop(self._eviction)
            if used != entry.used or not entry.evictable or self._entries.get(entry.name) is not entry:
                continue
            del self._entries[entry.name]
            self._free.append(entry.page)
            if entry.parent is not None:
                entry.parent.continuations -= 1
                self._offer(entry.parent)
            return True
        return False


def _role_views(memory: NDArray[np.uint8], layout: KvLayout, pages: int) -> list[NDArray[np.uint8]]:
    """Per role [pages, layers, heads, group bytes]; no copy."""
    views, start = [], 0
    for size in layout.group_bytes:
        shape = (pages, layout.layers, layout.heads, size)
        stop = start + int(np.prod(shape))
        views.append(memory[start:stop].reshape(shape))
        start = stop
    return views
