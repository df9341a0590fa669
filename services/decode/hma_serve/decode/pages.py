"""The memory that holds all KV, and what each request holds of it.

A *page* is one role (K or V) of one group of 32 tokens, in every layer and head: the bytes of a codec in the order that
the reader likes (`page_order`), or the plain elements of tokens that decode computed itself. It has one address, the
same in every layer and head: the memory is `[layers, kv_heads, bytes]`, and an address counts units of `ALIGNMENT`
bytes from the beginning of a head's range. So one table of addresses serves pages of any codec, and pages with
neighbouring addresses are neighbours in memory: keys of one head and a run of such pages are one contiguous piece.

Pages of all codecs and of all roles share the range (`slabs`): a codec that nobody uses costs nothing.

Ownership: free page -> `reserve` -> a `Reservation` -> `free` -> free page. Whoever holds a reservation is the only one
to read and write its pages, except those of a common prefix (`prefix_cache`): these belong to the cache once they are
complete (`publish`), may be read by several reservations, and stay after the last of them until memory is needed.
A reservation may begin with fewer pages for computed tokens than it needs (`grow`) and may lose them all (`strip`).
What `can_reserve` and `can_grow` promise holds until the next change. Nothing is allocated after the pool was built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hma_serve.core.errors import Internal
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.page_order import PageOrder, PageOrders, Role, page_order
from hma_serve.decode.prefix_cache import PrefixCache, SharedGroup
from hma_serve.decode.slabs import PageKind, Slabs

ALIGNMENT = 16
"""Bytes: the unit of addresses, to which every page of every head is aligned."""

PLAIN_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""The codec whose packed form unquantised elements are, by their dtype."""

_EXTENT_PAGES = 32
"""Unquantised pages of an extent at least: 1,024 tokens of one role."""
_EXTENT_WIDEST = 8
"""Pages of the widest codec that an extent holds at least."""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Shape of one token's KV.

    Attributes:
        layers: Decoder layers.
        kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
    """

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Need:
    """Pages that one request takes, known before it is admitted.

    Attributes:
        k_format: Of the packed keys; meaningless without packed groups.
        v_format: Of the packed values.
        packed_groups: Groups of 32 tokens that arrive packed.
        plain_groups: Groups of 32 tokens that decode computes, at most.
        interleaved: The packed keys' channels are in the interleaved order of RoPE, not half-split.
        offset: K offsets were subtracted from the packed keys, where the model has a table of them.
    """

    k_format: str
    v_format: str
    packed_groups: int
    plain_groups: int
    interleaved: bool = False
    offset: bool = True

    @classmethod
    def of(
        cls,
        *,
        packed_tokens: int,
        total_tokens: int,
        k_format: str,
        v_format: str,
        interleaved: bool = False,
        offset: bool = True,
    ) -> Need:
        """What a request of `total_tokens` (prompt and completion) needs, `packed_tokens` of them packed."""
        return cls(
            k_format=k_format,
            v_format=v_format,
            packed_groups=packed_tokens // GROUP_TOKENS,
            plain_groups=math.ceil((total_tokens - packed_tokens) / GROUP_TOKENS),
            interleaved=interleaved,
            offset=offset,
        )


@dataclass(slots=True, eq=False)
class Reservation:
    """The pages of one request, in the order of their tokens.

    Attributes:
        need: What was asked for.
        packed_k: int64 [packed_groups], addresses of the packed keys' pages.
        packed_v: The same for values.
        plain_k: int64 [held plain groups], addresses of the unquantised pages.
        plain_v: The same for values.
        shared: Its first packed groups as far as they are shared; the other pages are its own.
        present_groups: Packed groups that were there when it was made.
        version: Another number whenever its pages are others; page tables that were made for the same one are right.
    """

    need: Need
    packed_k: torch.Tensor
    packed_v: torch.Tensor
    plain_k: torch.Tensor
    plain_v: torch.Tensor
    shared: list[SharedGroup]
    present_groups: int
    version: int = field(default=0)

    @property
    def plain_groups(self) -> int:
        """Groups that it holds unquantised pages for."""
        return len(self.plain_k)

    def missing_groups(self, tokens: int) -> int:
        """Groups to `grow` by before its first `tokens` tokens can have KV."""
        wanted = math.ceil(tokens / GROUP_TOKENS) - self.need.packed_groups
        return max(0, min(wanted, self.need.plain_groups) - self.plain_groups)

    @property
    def own_pages(self) -> list[int]:
        """Addresses of the pages that belong to it alone."""
        shared = {page for group in self.shared for page in group.pages}
        parts = (self.packed_k, self.packed_v, self.plain_k, self.plain_v)
        return [address for part in parts for address in part.tolist() if address not in shared]


class PagePool:
    """All KV memory of one engine.

    Args:
        geometry: Of the model.
        packed_formats: Names of the codecs that are accepted.
        plain_dtype: Elements of unquantised pages; packed pages of the codec that is just these are always accepted.
        capacity_tokens: A single request of so many tokens must fit, however it is packed (if no wider than plain).
        orders: How packed pages lie in memory.
        device: Where the memory lies.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        packed_formats: Sequence[str],
        plain_dtype: torch.dtype,
        capacity_tokens: int,
        orders: PageOrders = page_order,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.plain_dtype = plain_dtype
        self.plain_format = PLAIN_FORMATS[plain_dtype]
        self._orders: dict[tuple[str, Role], PageOrder] = {
            (name, role): orders(name, role, geometry.head_dim)
            for name in dict.fromkeys((*packed_formats, self.plain_format))
            for role in Role
        }
        self._kinds = {name: PageKind(_quanta(order.page_bytes)) for name, order in self._orders.items()}
        self._plain_kind = PageKind(_quanta(GROUP_TOKENS * geometry.head_dim * plain_dtype.itemsize), yielding=True)
        self._plain_stride = self._plain_kind.stride
        widest = max(kind.stride for kind in (self._plain_kind, *self._kinds.values()))
        # A multiple of the plain page, so that plain pages can also be numbered.
        extent = self._plain_stride * max(_EXTENT_PAGES, math.ceil(_EXTENT_WIDEST * widest / self._plain_stride))
        plain_pages = 2 * math.ceil(capacity_tokens / GROUP_TOKENS)
        # Packed keys, values and plain pages may each begin an extent of their own: room asked for is room to be had.
        extents = 2 + math.ceil(plain_pages / (extent // self._plain_stride))
        self._slabs = Slabs(extents, extent)
        self._prefixes = PrefixCache(self._slabs)
        self._reservations: set[Reservation] = set()
        # Untouched memory costs nothing until it is written.
        shape = (geometry.layers, geometry.kv_heads, extents * extent * ALIGNMENT)
        self.memory = torch.empty(shape, dtype=torch.uint8, device=device)
        self._views = {
            kind: [self._pages_of(layer, order.page_bytes) for layer in self.memory]
            for kind, order in self._orders.items()
        }
        heads, page = geometry.kv_heads, (GROUP_TOKENS, geometry.head_dim)
        self._runs: list[torch.Tensor] = [layer.view(plain_dtype).view(heads, -1, *page) for layer in self.memory]
        self._plain: list[torch.Tensor] = [
            self._pages_of(layer, self._plain_stride * ALIGNMENT).view(plain_dtype).view(-1, heads, *page)
            for layer in self.memory
        ]

    @property
    def memory_bytes(self) -> int:
        """Size of the memory."""
        return self.memory.numel()

    @property
    def capacity_tokens(self) -> int:
        """Unquantised tokens that fit."""
        return self._slabs.extents * self._slabs.per_extent(self._plain_kind) // 2 * GROUP_TOKENS

    @property
    def used_tokens(self) -> int:
        """Held memory in unquantised tokens, rounded up: packed ones count for what they take.

        Prefixes that nobody holds do not count: they give way.
        """
        return math.ceil(self._slabs.live_quanta * GROUP_TOKENS / (2 * self._plain_stride))

    @property
    def free_tokens(self) -> int:
        """Memory that is not held, in unquantised tokens; pieces of extents that only another codec fits count too."""
        return self.capacity_tokens - self.used_tokens

    def order(self, page_format: str, role: Role) -> PageOrder:
        """How pages of a codec lie in memory."""
        return self._orders[page_format, role]

    def fits_when_empty(self, need: Need) -> bool:
        """Whether an idle pool could hold it: if not, waiting is of no use."""
        return self._slabs.fits_when_empty(self._pages(need))

    def can_reserve(self, need: Need, keys: Sequence[bytes] = (), plain_groups: int | None = None) -> bool:
        """Whether `reserve` would succeed now."""
        present = self._present(need, keys)
        self._prefixes.acquire(present)
        fits = self._slabs.could_fit(self._pages(need, len(present), plain_groups))
        self._prefixes.release(present)
        return fits

    def reserve(self, need: Need, keys: Sequence[bytes] = (), plain_groups: int | None = None) -> Reservation:
        """Takes the pages; ask `can_reserve` before.

        Args:
            need: How many.
            keys: Of the packed groups, in order (`prefix_keys`); pages of the longest prefix that is here are shared.
            plain_groups: Of the computed groups, how many now; None: all.

        Raises:
            Internal: They are not there.
        """
        present = self._present(need, keys)
        self._prefixes.acquire(present)
        groups = need.plain_groups if plain_groups is None else plain_groups
        pages = self._pages(need, len(present), groups)
        if not self._slabs.could_fit(pages):
            self._prefixes.release(present)
            raise Internal("pages were reserved that are not free")
        self._make_room(pages)
        reservation = Reservation(
            need,
            self._take_packed(need, Role.K, [group.k_page for group in present]),
            self._take_packed(need, Role.V, [group.v_page for group in present]),
            self._take_plain(groups),
            self._take_plain(groups),
            present,
            len(present),
        )
        self._reservations.add(reservation)
        return reservation

    def publish(self, reservation: Reservation, keys: Sequence[bytes]) -> None:
        """Lets others share its packed pages, which are complete and will not be written again."""
        k_pages, v_pages = reservation.packed_k.tolist(), reservation.packed_v.tolist()
        for group in range(len(reservation.shared), len(keys)):
            if keys[group] in self._prefixes:
                # Another request brought the same. These remain its own, and so do those behind them: what a
                # reservation shares is a prefix.
                return
            reservation.shared.append(self._prefixes.add(keys[group], k_pages[group], v_pages[group]))

    def can_grow(self, groups: int) -> bool:
        """Whether `grow` would succeed now."""
        return self._slabs.could_fit({self._plain_kind: 2 * groups})

    def can_finish_each(self) -> bool:
        """Whether every reservation could grow to all it needs if the others were stripped."""
        most = max((held.need.plain_groups for held in self._reservations), default=0)
        return self._slabs.could_fit_alone(self._plain_kind, 2 * most)

    def grow(self, reservation: Reservation, groups: int) -> None:
        """Takes more pages for computed tokens; ask `can_grow` before."""
        self._make_room({self._plain_kind: 2 * groups})
        reservation.plain_k = torch.cat([reservation.plain_k, self._take_plain(groups)])
        reservation.plain_v = torch.cat([reservation.plain_v, self._take_plain(groups)])
        reservation.version += 1

    def strip(self, reservation: Reservation) -> None:
        """Gives all pages of computed tokens back; the packed ones stay."""
        self._slabs.give_back([*reservation.plain_k.tolist(), *reservation.plain_v.tolist()])
        reservation.plain_k = reservation.plain_v = torch.empty(0, dtype=torch.int64)
        reservation.version += 1

    def forget_idle_prefixes(self) -> None:
        """Gives up every prefix that nobody holds."""
        while self._prefixes.evict():
            pass

    def free(self, reservation: Reservation) -> None:
        """Gives the pages back.

        Raises:
            Internal: They were given back before, or are another pool's.
        """
        if reservation not in self._reservations:
            raise Internal("pages were freed that are not held")
        self._reservations.remove(reservation)
        self._slabs.give_back(reservation.own_pages)
        self._prefixes.release(reservation.shared)

    def packed(self, page_format: str, role: Role, layer: int) -> torch.Tensor:
        """Pages of one layer in one codec and role, uint8 [addresses, kv_heads, page_bytes].

        Index it with a reservation's addresses. A view over the whole memory, whose rows overlap: only those at
        addresses of this codec's pages mean anything.
        """
        return self._views[page_format, role][layer]

    def plain(self, layer: int) -> torch.Tensor:
        """The same for unquantised pages: [addresses, kv_heads, 32, head_dim] in `plain_dtype`."""
        return self._plain[layer]

    def plain_runs(self, layer: int) -> torch.Tensor:
        """The same pages by number, [kv_heads, numbers, 32, head_dim]: a slice of numbers is contiguous per head."""
        return self._runs[layer]

    def plain_numbers(self, addresses: torch.Tensor) -> torch.Tensor:
        """Numbers of unquantised pages for `plain_runs`."""
        return addresses // self._plain_stride

    def store(
        self, page_format: str, role: Role, layer: int, addresses: torch.Tensor, heads: slice, units: torch.Tensor
    ) -> None:
        """Puts what arrived into pages, in their order.

        Args:
            page_format: The codec's name.
            role: K or V.
            layer: Which layer.
            addresses: int64 [groups], of the pages.
            heads: Which heads.
            units: uint8 [heads, groups, group_bytes], as on the wire.
        """
        pages = self._views[page_format, role][layer]
        self._orders[page_format, role].place(units.to(self.memory.device), pages, addresses, heads)

    def clear(self, plain_pages: torch.Tensor) -> None:
        """Zeroes unquantised pages, so that what is not written yet is finite wherever it is read and masked.

        Args:
            plain_pages: int64 [n], addresses.
        """
        for layer in self._plain:
            layer.index_fill_(0, plain_pages, 0)

    def check_integrity(self) -> None:
        """Proves that every page and extent has exactly one owner, and that holders of prefixes are counted right.

        Raises:
            Internal: Naming what is wrong.
        """
        self._prefixes.check(group for held in self._reservations for group in held.shared)
        own = (page for held in self._reservations for page in held.own_pages)
        self._slabs.check([*own, *self._prefixes.live_pages], self._prefixes.parked_pages)

    def _pages_of(self, layer: torch.Tensor, page_bytes: int) -> torch.Tensor:
        heads, head_bytes = layer.shape
        rows = (head_bytes - page_bytes) // ALIGNMENT + 1
        return layer.as_strided((rows, heads, page_bytes), (ALIGNMENT, head_bytes, 1))

    def _present(self, need: Need, keys: Sequence[bytes]) -> list[SharedGroup]:
        return self._prefixes.longest(keys[: need.packed_groups])

    def _pages(self, need: Need, present: int = 0, plain_groups: int | None = None) -> Mapping[PageKind, int]:
        """Pages to take, by kind."""
        pages = {self._plain_kind: 2 * (need.plain_groups if plain_groups is None else plain_groups)}
        if need.packed_groups > present:
            for name in ((need.k_format, Role.K), (need.v_format, Role.V)):
                kind = self._kinds[name]
                pages[kind] = pages.get(kind, 0) + need.packed_groups - present
        return pages

    def _make_room(self, pages: Mapping[PageKind, int]) -> None:
        while not self._slabs.fits(pages):
            if not self._prefixes.evict():
                raise Internal("pages were taken that are not free")

    def _take_packed(self, need: Need, role: Role, present: list[int]) -> torch.Tensor:
        missing = need.packed_groups - len(present)
        if missing:
            kind = self._kinds[need.k_format if role is Role.K else need.v_format, role]
            present = present + self._slabs.take(kind, missing)
        return torch.tensor(present, dtype=torch.int64)

    def _take_plain(self, pages: int) -> torch.Tensor:
        return torch.tensor(self._slabs.take(self._plain_kind, pages), dtype=torch.int64)


def _quanta(page_bytes: int) -> int:
    return -(-page_bytes // ALIGNMENT)
