"""The memory that holds all KV: one block, cut into pages of several formats, every byte owned exactly once.

A *page* is one role (K or V) of one group of 32 tokens, for all layers and heads, in one format: the bytes of a codec
as they came over the wire, or the plain elements of tokens that decode computed itself. Formats differ in size, so the
memory is cut into *extents*, each a multiple of every format's page. An extent belongs to one format while any of its
pages is held and to none otherwise; packed prompts therefore really take less room, and no mixture of formats can need
more memory than there is.

Memory is laid out layer by layer, so that the pages of one layer and format are one contiguous tensor
`[pages, kv_heads, group_bytes]` and a page has the same index in every layer.

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
from hma_serve.quant import codec

PLAIN_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""The format of unquantised pages, by the dtype of their elements."""


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

    def page_bytes(self, page_format: str) -> int:
        """Bytes of one page in one layer."""
        return self.kv_heads * codec(page_format).group_bytes(self.head_dim)


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
        packed_k: int64 [packed_groups], indices of the packed keys' pages in their format.
        packed_v: The same for values.
        plain_k: int64 [plain_groups], indices of the unquantised pages.
        plain_v: The same for values.
    """

    need: Need
    packed_k: torch.Tensor
    packed_v: torch.Tensor
    plain_k: torch.Tensor
    plain_v: torch.Tensor


class _FormatPages:
    """Free pages of one format, by the extent they lie in."""

    def __init__(self, page_bytes: int, per_extent: int) -> None:
        self.page_bytes = page_bytes
        self.per_extent = per_extent
        self.free: dict[int, list[int]] = {}
        self.extents: set[int] = set()

    @property
    def free_pages(self) -> int:
        return sum(map(len, self.free.values()))

    @property
    def held_pages(self) -> int:
        return len(self.extents) * self.per_extent - self.free_pages

    def missing_extents(self, pages: int) -> int:
        return math.ceil(max(0, pages - self.free_pages) / self.per_extent)

    def add(self, extent: int) -> None:
        self.extents.add(extent)
        self.free[extent] = list(range((extent + 1) * self.per_extent - 1, extent * self.per_extent - 1, -1))

    def take(self, pages: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < pages:
            extent, free = next(iter(self.free.items()))
            while free and len(taken) < pages:
                taken.append(free.pop())
            if not free:
                del self.free[extent]
        return taken

    def give_back(self, pages: Sequence[int]) -> list[int]:
        """Returns the extents that nobody uses any more."""
        emptied = []
        for page in pages:
            extent = page // self.per_extent
            free = self.free.setdefault(extent, [])
            free.append(page)
            if len(free) == self.per_extent:
                del self.free[extent]
                self.extents.remove(extent)
                emptied.append(extent)
        return emptied


class PagePool:
    """All KV memory of one engine.

    Args:
        geometry: Of the model.
        packed_formats: Names of the codecs that are accepted.
        plain_dtype: Elements of unquantised pages.
        capacity_tokens: A single request of so many tokens must fit, however it is packed (if no wider than plain).
        device: Where the memory lies.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        packed_formats: Sequence[str],
        plain_dtype: torch.dtype,
        capacity_tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.plain_dtype = plain_dtype
        self.plain_format = PLAIN_FORMATS[plain_dtype]
        sizes = {name: geometry.page_bytes(name) for name in dict.fromkeys((*packed_formats, self.plain_format))}
        extent_bytes = math.lcm(*sizes.values())
        self._formats = {name: _FormatPages(size, extent_bytes // size) for name, size in sizes.items()}
        plain_pages = 2 * math.ceil(capacity_tokens / GROUP_TOKENS)
        # One request's packed keys and values may each begin an extent of their own: room asked for is room to be had.
        self.extents = 2 + math.ceil(plain_pages / self._formats[self.plain_format].per_extent)
        self._free_extents = list(range(self.extents - 1, -1, -1))
        self._reservations: set[Reservation] = set()
        # Untouched memory costs nothing until it is written.
        self._memory = torch.empty((geometry.layers, self.extents * extent_bytes), dtype=torch.uint8, device=device)
        self._views: dict[str, list[torch.Tensor]] = {
            name: [layer.view(-1, geometry.kv_heads, size // geometry.kv_heads) for layer in self._memory]
            for name, size in sizes.items()
        }
        self._plain = self._memory.view(plain_dtype).view(
            geometry.layers, -1, geometry.kv_heads, GROUP_TOKENS, geometry.head_dim
        )
        self._plain_layers: list[torch.Tensor] = list(self._plain)

    @property
    def memory_bytes(self) -> int:
        """Size of the memory."""
        return self._memory.numel()

    @property
    def capacity_tokens(self) -> int:
        """Unquantised tokens that fit."""
        return self.extents * self._formats[self.plain_format].per_extent // 2 * GROUP_TOKENS

    @property
    def used_tokens(self) -> int:
        """Held memory in unquantised tokens, rounded up: packed ones count for what they take."""
        held = sum(pages.held_pages * pages.page_bytes for pages in self._formats.values())
        return math.ceil(held * GROUP_TOKENS / (2 * self._formats[self.plain_format].page_bytes))

    def fits_when_empty(self, need: Need) -> bool:
        """Whether an idle pool could hold it: if not, waiting is of no use."""
        pages = self._pages(need)
        wanted = sum(math.ceil(count / self._formats[name].per_extent) for name, count in pages.items())
        return wanted <= self.extents

    def can_reserve(self, need: Need) -> bool:
        """Whether `reserve` would succeed now."""
        missing = sum(self._formats[name].missing_extents(count) for name, count in self._pages(need).items())
        return missing <= len(self._free_extents)

    def reserve(self, need: Need) -> Reservation:
        """Takes the pages; ask `can_reserve` before.

        Raises:
            Internal: They are not there.
        """
        if not self.can_reserve(need):
            raise Internal("pages were reserved that are not free")
        k_packed = self._take(need.k_format, need.packed_groups)
        v_packed = self._take(need.v_format, need.packed_groups)
        reservation = Reservation(
            need,
            k_packed,
            v_packed,
            self._take(self.plain_format, need.plain_groups),
            self._take(self.plain_format, need.plain_groups),
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
        need = reservation.need
        for name, pages in (
            (need.k_format, reservation.packed_k),
            (need.v_format, reservation.packed_v),
            (self.plain_format, reservation.plain_k),
            (self.plain_format, reservation.plain_v),
        ):
            if len(pages):
                self._free_extents += self._formats[name].give_back(pages.tolist())

    def packed(self, page_format: str, layer: int) -> torch.Tensor:
        """All pages of one layer in one format, uint8 [pages, kv_heads, group_bytes]: index it with a reservation."""
        return self._views[page_format][layer]

    def plain(self, layer: int) -> torch.Tensor:
        """All unquantised pages of one layer, [pages, kv_heads, 32, head_dim] in `plain_dtype`."""
        return self._plain_layers[layer]

    def clear(self, plain_pages: torch.Tensor) -> None:
        """Zeroes unquantised pages, so that what is not written yet is finite wherever it is read and masked.

        Args:
            plain_pages: int64 [n].
        """
        self._plain.index_fill_(1, plain_pages, 0)

    def check_integrity(self) -> None:
        """Proves that every page and extent has exactly one owner.

        Raises:
            Internal: Naming what is wrong.
        """
        owned: list[int] = list(self._free_extents)
        for name, pages in self._formats.items():
            owned += pages.extents
            held = [page for reservation in self._reservations for page in self._held(reservation, name)]
            everything = sorted(held + [page for free in pages.free.values() for page in free])
            expected = sorted(
                page
                for extent in pages.extents
                for page in range(extent * pages.per_extent, (extent + 1) * pages.per_extent)
            )
            if everything != expected:
                raise Internal(f"pages of format {name} are lost or owned twice")
        if sorted(owned) != list(range(self.extents)):
            raise Internal("extents are lost or owned twice")

    def _pages(self, need: Need) -> Mapping[str, int]:
        pages: dict[str, int] = {}
        for name, count in (
            (need.k_format, need.packed_groups),
            (need.v_format, need.packed_groups),
            (self.plain_format, 2 * need.plain_groups),
        ):
            if count:
                pages[name] = pages.get(name, 0) + count
        return pages

    def _take(self, page_format: str, pages: int) -> torch.Tensor:
        if not pages:
            return torch.empty(0, dtype=torch.int64)
        store = self._formats[page_format]
        for _ in range(store.missing_extents(pages)):
            store.add(self._free_extents.pop())
        return torch.tensor(store.take(pages), dtype=torch.int64)

    def _held(self, reservation: Reservation, page_format: str) -> list[int]:
        need, held = reservation.need, []
        if need.packed_groups and need.k_format == page_format:
            held += reservation.packed_k.tolist()
        if need.packed_groups and need.v_format == page_format:
            held += reservation.packed_v.tolist()
        if page_format == self.plain_format:
            held += reservation.plain_k.tolist() + reservation.plain_v.tolist()
        return held
