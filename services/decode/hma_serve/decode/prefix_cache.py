"""Which packed prompt pages may serve another request: by content, while anybody uses them and, with room, after.

A *shared group* is the K page and the V page of 32 prompt tokens under a key that stands for everything that decided
their bytes: the tokens, all tokens before them, model, codecs, producer's profile and tenant (`prefix_keys`). Equal
keys mean equal bytes, so the group is written once and read by whoever has the key.

Groups are counted: `acquire` and `release` come in pairs. A group that nobody holds stays, its pages parked, until
memory is asked for; then those that were used longest ago go first. The last group of a prefix is released before the
first, so a prefix is eaten from its end and what is left of it can still be found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hma_serve.core.errors import Internal
from hma_serve.decode.slabs import Slabs


@dataclass(slots=True, eq=False)
class SharedGroup:
    """Two pages with a key.

    Attributes:
        key: See the module.
        k_page: Address of the keys.
        v_page: Address of the values.
        holders: Reservations that read it; 0: parked.
    """

    key: bytes
    k_page: int
    v_page: int
    holders: int = 1

    @property
    def pages(self) -> tuple[int, int]:
        """Both addresses."""
        return self.k_page, self.v_page


class PrefixCache:
    """All shared groups.

    Args:
        slabs: Where their pages are accounted for.
    """

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._groups: dict[bytes, SharedGroup] = {}
        self._idle: OrderedDict[bytes, SharedGroup] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._groups

    @property
    def idle_groups(self) -> int:
        """Groups that nobody holds."""
        return len(self._idle)

    @property
    def live_pages(self) -> Iterable[int]:
        """Addresses of groups that somebody holds."""
        return (page for group in self._groups.values() if group.holders for page in group.pages)

    @property
    def parked_pages(self) -> Iterable[int]:
        """Addresses of the others."""
        return (page for group in self._idle.values() for page in group.pages)

    def longest(self, keys: Sequence[bytes]) -> list[SharedGroup]:
        """The groups of the longest prefix that is here."""
        found = []
        for key in keys:
            group = self._groups.get(key)
            if group is None:
                break
            found.append(group)
        return found

    def acquire(self, groups: Iterable[SharedGroup]) -> None:
        """One holder more for each."""
        for group in groups:
            if not group.holders:
                del self._idle[group.key]
                self._slabs.unpark(group.pages)
            group.holders += 1

    def release(self, groups: Sequence[SharedGroup]) -> None:
        """One holder fewer for each of a prefix's groups, given in the order of their tokens."""
        for group in reversed(groups):
            group.holders -= 1
            if not group.holders:
                self._slabs.park(group.pages)
                self._idle[group.key] = group

    def add(self, key: bytes, k_page: int, v_page: int) -> SharedGroup:
        """A new group out of two live pages, which it owns from now on; it has one holder."""
        group = self._groups[key] = SharedGroup(key, k_page, v_page)
        return group

    def evict(self) -> bool:
        """Frees the pages of the group that was released longest ago; False: all have holders."""
        if not self._idle:
            return False
        key, group = self._idle.popitem(last=False)
        del self._groups[key]
        self._slabs.drop(group.pages)
        return True

    def check(self, held: Iterable[SharedGroup]) -> None:
        """Proves that holders are counted right.

        Args:
            held: Every group once for each reservation that holds it.

        Raises:
            Internal: A count is wrong, or a group is held that is not here.
        """
        counts: dict[bytes, int] = {}
        for group in held:
            if self._groups.get(group.key) is not group:
                raise Internal("a shared group is held that was given up")
            counts[group.key] = counts.get(group.key, 0) + 1
        if any(group.holders != counts.get(key, 0) for key, group in self._groups.items()):
            raise Internal("holders of a shared group are counted wrong")
        if set(self._idle) != {key for key, group in self._groups.items() if not group.holders}:
            raise Internal("an idle shared group cannot be evicted")
