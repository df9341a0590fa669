"""The memory that holds all KV, and what each request holds of it.

A *page* is one role (K or V) of one group of 32 tokens, in every layer and head: the bytes of a codec in the order that
the reader likes (`page_order`), or the plain elements of tokens that decode computed itself. It has one address, the
same in every layer and head: the memory is `[layers, kv_heads, bytes]`, and an address counts units of `ALIGNMENT`
bytes from the beginning of a head's range. So one table of addresses serves pages of any codec, and pages with
neighbouring addresses are neighbours in memory: keys of one head and a run of such pages are one contiguous piece.

Pages of all codecs and of all roles share the range (`slabs`): a codec that nobody uses costs nothing.

Ownership: free page -> `reserve` -> a `Reservation` -> `free` -> free page. Whoever holds a reservation is the only one
to read and write its pages. Nothing is allocated after the pool was built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hma_serve.core.errors import Internal
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.page_order import PageOrder, PageOrders, Role, page_order
from hma_serve.decode.slabs import Slabs

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
        plain_groups: Groups of 32 tokens that decode computes.
    """

    k_format: str
    v_format: str
    packed_groups: int
    plain_groups: int

    @classmethod
    def of(cls, *, packed_tokens: int, total_tokens: int, k_format: str, v_format: str) -> Need:
        """What a request of `total_tokens` (prompt and completion) needs, `packed_tokens` of them packed."""
        return cls(
            k_format=k_format,
            v_format=v_format,
            packed_groups=packed_tokens // GROUP_TOKENS,
            plain_groups=math.ceil((total_tokens - packed_tokens) / GROUP_TOKENS),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """The pages of one request, in the order of their tokens.

    Attributes:
        need: What was asked for.
        packed_k: int64 [packed_groups], addresses of the packed keys' pages.
        packed_v: The same for values.
        plain_k: int64 [plain_groups], addresses of the unquantised pages.
        plain_v: The same for values.
    """

    need: Need
    packed_k: torch.Tensor
    packed_v: torch.Tensor
    plain_k: torch.Tensor
    plain_v: torch.Tensor


class PagePool:
    """All KV memory of one engine.

    Args:
        geometry: Of the model.
        packed_formats: Names of the codecs that are accepted.
        plain_dtype: Elements of unquantised pages.
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
        self._orders: dict[tuple[str, Role], PageOrder] = {
            (name, role): orders(name, role, geometry.head_dim) for name in packed_formats for role in Role
        }
        self._strides = {kind: _quanta(order.page_bytes) for kind, order in self._orders.items()}
        self._plain_stride = _quanta(GROUP_TOKENS * geometry.head_dim * plain_dtype.itemsize)
        widest = max((self._plain_stride, *self._strides.values()))
        # A multiple of the plain page, so that plain pages can also be numbered.
        extent = self._plain_stride * max(_EXTENT_PAGES, math.ceil(_EXTENT_WIDEST * widest / self._plain_stride))
        plain_pages = 2 * math.ceil(capacity_tokens / GROUP_TOKENS)
        # One request's packed keys and values may each begin an extent of their own: room asked for is room to be had.
        extents = 2 + math.ceil(plain_pages / (extent // self._plain_stride))
        self._slabs = Slabs(extents, extent)
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
        return self._slabs.extents * self._slabs.per_extent(self._plain_stride) // 2 * GROUP_TOKENS

    @property
    def used_tokens(self) -> int:
        """Held memory in unquantised tokens, rounded up: packed ones count for what they take."""
        return math.ceil(self._slabs.live_quanta * GROUP_TOKENS / (2 * self._plain_stride))

    def order(self, page_format: str, role: Role) -> PageOrder:
        """How pages of a codec lie in memory."""
        return self._orders[page_format, role]

    def fits_when_empty(self, need: Need) -> bool:
        """Whether an idle pool could hold it: if not, waiting is of no use."""
        return self._slabs.fits_when_empty(self._pages(need))

    def can_reserve(self, need: Need) -> bool:
        """Whether `reserve` would succeed now."""
        return self._slabs.fits(self._pages(need))

    def reserve(self, need: Need) -> Reservation:
        """Takes the pages; ask `can_reserve` before.

        Raises:
            Internal: They are not there.
        """
        if not self.can_reserve(need):
            raise Internal("pages were reserved that are not free")
        reservation = Reservation(
            need,
            self._take_packed(need, Role.K),
            self._take_packed(need, Role.V),
            self._take(self._plain_stride, need.plain_groups),
            self._take(self._plain_stride, need.plain_groups),
        )
        self._reservations.add(reservation)
        return reservation

    def free(self, reservation: Reservation) -> None:
        """Gives the pages back.

        Raises:
            Internal: They were given back before, or are another pool's.
        """
        if reservation not in self._reservations:
            raise Internal("pages were freed that are not held")
        self._reservations.remove(reservation)
        self._slabs.give_back(_addresses(reservation))

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
        arranged = self._orders[page_format, role].arrange(units.to(self.memory.device))
        self._views[page_format, role][layer][addresses, heads] = arranged.transpose(0, 1)

    def clear(self, plain_pages: torch.Tensor) -> None:
        """Zeroes unquantised pages, so that what is not written yet is finite wherever it is read and masked.

        Args:
            plain_pages: int64 [n], addresses.
        """
        for layer in self._plain:
            layer.index_fill_(0, plain_pages, 0)

    def check_integrity(self) -> None:
        """Proves that every page and extent has exactly one owner.

        Raises:
            Internal: Naming what is wrong.
        """
        self._slabs.check((address for held in self._reservations for address in _addresses(held)), ())

    def _pages_of(self, layer: torch.Tensor, page_bytes: int) -> torch.Tensor:
        heads, head_bytes = layer.shape
        rows = (head_bytes - page_bytes) // ALIGNMENT + 1
        return layer.as_strided((rows, heads, page_bytes), (ALIGNMENT, head_bytes, 1))

    def _pages(self, need: Need) -> Mapping[int, int]:
        """Pages by stride."""
        pages = {self._plain_stride: 2 * need.plain_groups}
        if need.packed_groups:
            for kind in ((need.k_format, Role.K), (need.v_format, Role.V)):
                stride = self._strides[kind]
                pages[stride] = pages.get(stride, 0) + need.packed_groups
        return pages

    def _take_packed(self, need: Need, role: Role) -> torch.Tensor:
        if not need.packed_groups:
            return torch.empty(0, dtype=torch.int64)
        return self._take(self._strides[need.k_format if role is Role.K else need.v_format, role], need.packed_groups)

    def _take(self, stride: int, pages: int) -> torch.Tensor:
        return torch.tensor(self._slabs.take(stride, pages), dtype=torch.int64)


def _quanta(page_bytes: int) -> int:
    return -(-page_bytes // ALIGNMENT)


def _addresses(reservation: Reservation) -> list[int]:
    parts = (reservation.packed_k, reservation.packed_v, reservation.plain_k, reservation.plain_v)
    return [address for part in parts for address in part.tolist()]
