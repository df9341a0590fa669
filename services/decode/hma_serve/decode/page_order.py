"""In which order a page holds the bytes of a unit that arrived: the seam between the format and a device's kernels.

A *page* is one role of one head's group of 32 tokens. On the wire it is a unit of `group_bytes`; in memory it has
`page_bytes`, the same information in the order that the reader likes: fragments of a tensor core, values channel by
channel, scales apart. `arrange` runs once when a block arrives and is undone by `restore`, bit for bit. It never
dequantises: it permutes bytes, re-codes a byte one to one, or pads.

Scales of every granularity travel inside the units (those of a head or a tensor are repeated in each), so a page needs
nothing beside itself to be read.

A pool takes one `PageOrders`; `page_order` is the one of readers that want the wire's order, as the CPU does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch

from hma_serve.quant import codec


class Role(Enum):
    """What a page holds."""

    K = "k"
    """Keys after qk-norm and RoPE, less the K offset where one is in use."""
    V = "v"


class PageOrder(ABC):
    """How one codec's units of one role lie in pages.

    Attributes:
        page_bytes: Of a page; not less than the unit's. The pool aligns pages to 16 bytes (`pages.ALIGNMENT`); an
            order that needs more pads its pages to a multiple of what it needs.
    """

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """See the class."""

    @abstractmethod
    def arrange(self, wire: torch.Tensor, /) -> torch.Tensor:
        """Brings units into the page's order.

        Args:
            wire: uint8 [..., group_bytes], on any device.

        Returns:
            uint8 [..., page_bytes], on the same device; may be `wire` itself.
        """

    @abstractmethod
    def restore(self, pages: torch.Tensor, /) -> torch.Tensor:
        """The inverse of `arrange`: uint8 [..., page_bytes] to [..., group_bytes]."""

    def place(self, units: torch.Tensor, pages: torch.Tensor, addresses: torch.Tensor, heads: slice) -> None:
        """Arranges units and puts them where they belong.

        Args:
            units: uint8 [heads, groups, group_bytes], contiguous.
            pages: uint8 [addresses, kv_heads, page_bytes], a layer's, on the same device.
            addresses: int64 [groups], on the same device.
            heads: Which heads.
        """
        pages[addresses, heads] = self.arrange(units).transpose(0, 1)


PageOrders: TypeAlias = Callable[[str, Role, int], PageOrder]
"""Gives the order of a codec (by name), role and head_dim. Pure: equal arguments give equal orders."""


@dataclass(frozen=True, slots=True)
class WireOrder(PageOrder):
    """Pages as they came.

    Attributes:
        unit_bytes: Of a unit on the wire.
    """

    unit_bytes: int

    @property
    def page_bytes(self) -> int:
        """The unit's."""
        return self.unit_bytes

    def arrange(self, wire: torch.Tensor, /) -> torch.Tensor:
        """Nothing to do."""
        return wire

    def restore(self, pages: torch.Tensor, /) -> torch.Tensor:
        """Nothing to do."""
        return pages


def page_order(page_format: str, role: Role, head_dim: int) -> PageOrder:
    """The wire's own order, for every codec: what torch's decoders read."""
    del role
    return WireOrder(codec(page_format).group_bytes(head_dim))
