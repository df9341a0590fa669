"""Who owns which part of the KV memory: pages of several sizes out of one range of addresses, every one owned once.

The range is cut into *extents* of one fixed length. An extent belongs to the pages of one *kind* (their padded length,
and whether they can be given up) while any of them is taken, and to none otherwise, so a size that nobody uses costs
nothing, and no mixture of sizes can need more than there is. What an extent's length is not a multiple of is lost at
its end.

A page's address is the number of the quantum at which it begins. It does not say the page's kind; its extent does.

States of a page: free -> `take` -> live -> `give_back` -> free; and live -> `park` -> parked -> `unpark` -> live. A
parked page still holds what was written, and its owner promises to give it back whenever memory is asked for. So there
are three questions: whether pages can be taken now (`fits`), whether they could be after all parked ones were given
back (`could_fit`), and after all yielding ones were too (`could_fit_alone`). All are answered from counters.

Pure bookkeeping: no memory is touched here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hma_serve.core.errors import Internal


class PageKind(NamedTuple):
    """Pages that share extents.

    Attributes:
        stride: Quanta of a page, padding included.
        yielding: Whether they can be had back for another owner. Kept apart from the others, or a single page that
            stays would hold the extent of many that go.
    """

    stride: int
    yielding: bool = False


@dataclass(slots=True)
class _Size:
    """Pages of one kind.

    Attributes:
        per_extent: Pages that an extent holds.
        free: By extent with a free page, its free addresses, as a heap: the lowest is taken first, so pages that are
            taken together lie together.
        free_pages: Of all extents.
        live_pages: Taken and not parked.
        live_extents: Extents with a live page.
    """

    per_extent: int
    free: dict[int, list[int]] = field(default_factory=dict)
    free_pages: int = 0
    live_pages: int = 0
    live_extents: int = 0

    def extents_for(self, pages: int, free: int) -> int:
        return -(-max(0, pages - free) // self.per_extent)


class Slabs:
    """The range of addresses.

    Args:
        extents: How many.
        extent_quanta: Length of one.
    """

    def __init__(self, extents: int, extent_quanta: int) -> None:
        self.extents = extents
        self.extent_quanta = extent_quanta
        self._free_extents = list(range(extents - 1, -1, -1))
        self._sizes: dict[PageKind, _Size] = {}
        self._kind_of: dict[int, PageKind] = {}
        self._live_in: dict[int, int] = {}

    @property
    def live_quanta(self) -> int:
        """What live pages take, padding included."""
        return sum(kind.stride * size.live_pages for kind, size in self._sizes.items())

    def per_extent(self, kind: PageKind) -> int:
        """Pages of a kind that one extent holds."""
        return self.extent_quanta // kind.stride

    def fits_when_empty(self, wanted: Mapping[PageKind, int]) -> bool:
        """Whether an idle range could hold so many pages by kind."""
        return sum(-(-pages // self.per_extent(kind)) for kind, pages in wanted.items()) <= self.extents

    def fits(self, wanted: Mapping[PageKind, int]) -> bool:
        """Whether so many pages by kind can be taken now."""
        missing = 0
        for kind, pages in wanted.items():
            size = self._size(kind)
            missing += size.extents_for(pages, size.free_pages)
        return missing <= len(self._free_extents)

    def could_fit(self, wanted: Mapping[PageKind, int]) -> bool:
        """Whether they could be, once every parked page was given back."""
        missing = 0
        for kind, pages in wanted.items():
            size = self._size(kind)
            missing += size.extents_for(pages, size.live_extents * size.per_extent - size.live_pages)
        return missing <= self.extents - sum(size.live_extents for size in self._sizes.values())

    def could_fit_alone(self, kind: PageKind, pages: int) -> bool:
        """Whether so many yielding pages could be, once all others of them were given back too."""
        kept = sum(size.live_extents for kind, size in self._sizes.items() if not kind.yielding)
        return -(-pages // self.per_extent(kind)) <= self.extents - kept

    def take(self, kind: PageKind, pages: int) -> list[int]:
        """Takes pages, of neighbouring addresses where it can; ask `fits` before.

        Returns:
            Their addresses, in quanta.

        Raises:
            Internal: They are not there.
        """
        if not self.fits({kind: pages}):
            raise Internal("pages were taken that are not free")
        size = self._size(kind)
        for _ in range(size.extents_for(pages, size.free_pages)):
            self._cut(kind, size)
        taken: list[int] = []
        while len(taken) < pages:
            extent, free = next(iter(size.free.items()))
            count = min(len(free), pages - len(taken))
            taken += [heapq.heappop(free) for _ in range(count)]
            size.free_pages -= count
            if not free:
                del size.free[extent]
        self._enliven(taken)
        return taken

    def give_back(self, addresses: Iterable[int]) -> None:
        """Live pages become free, and extents of which no page is taken belong to nobody."""
        addresses = list(addresses)
        self.park(addresses)
        self.drop(addresses)

    def park(self, addresses: Iterable[int]) -> None:
        """Live pages become parked."""
        for address in addresses:
            extent = address // self.extent_quanta
            size = self._sizes[self._kind_of[extent]]
            size.live_pages -= 1
            self._live_in[extent] -= 1
            size.live_extents -= self._live_in[extent] == 0

    def unpark(self, addresses: Iterable[int]) -> None:
        """Parked pages become live again."""
        self._enliven(addresses)

    def drop(self, addresses: Iterable[int]) -> None:
        """Parked pages become free."""
        for address in addresses:
            extent = address // self.extent_quanta
            size = self._sizes[self._kind_of[extent]]
            free = size.free.setdefault(extent, [])
            heapq.heappush(free, address)
            size.free_pages += 1
            if len(free) == size.per_extent:
                del size.free[extent], self._kind_of[extent], self._live_in[extent]
                size.free_pages -= size.per_extent
                self._free_extents.append(extent)

    def check(self, live: Iterable[int], parked: Iterable[int]) -> None:
        """Proves that these are the taken pages, each once, and that all else is free, once.

        Raises:
            Internal: Naming what is wrong.
        """
        live, parked = list(live), list(parked)
        found = sorted([*live, *parked, *(a for size in self._sizes.values() for f in size.free.values() for a in f)])
        expected = []
        for extent, kind in self._kind_of.items():
            start = extent * self.extent_quanta
            expected += [start + kind.stride * number for number in range(self.per_extent(kind))]
        if found != sorted(expected):
            raise Internal("pages are lost or owned twice")
        if sorted([*self._free_extents, *self._kind_of]) != list(range(self.extents)):
            raise Internal("extents are lost or owned twice")
        if sum(size.live_pages for size in self._sizes.values()) != len(live):
            raise Internal("more or fewer pages count as live than are owned")

    def _size(self, kind: PageKind) -> _Size:
        size = self._sizes.get(kind)
        if size is None:
            size = self._sizes[kind] = _Size(self.per_extent(kind))
        return size

    def _cut(self, kind: PageKind, size: _Size) -> None:
        extent = self._free_extents.pop()
        start = extent * self.extent_quanta
        self._kind_of[extent] = kind
        self._live_in[extent] = 0
        size.free[extent] = [start + kind.stride * number for number in range(size.per_extent)]
        size.free_pages += size.per_extent

    def _enliven(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            extent = address // self.extent_quanta
            size = self._sizes[self._kind_of[extent]]
            size.live_pages += 1
            size.live_extents += self._live_in[extent] == 0
            self._live_in[extent] += 1
