"""The order of a packed page's bytes on a GPU, by format and role: how it is made on arrival, and undone.

Read as they came, in fragment order: `tt_bfp8_b`, `mxint8`, `int8`, `mxfp8_e4m3` and the FP8 family. Read as the
integers that they exactly are, at 8.5 bits: `tt_bfp4_b`, `tt_bfp2_b`, `mxfp4`, `nvfp4`. `bf16` is read as plain pages
are. What is left (`int4`) has no order here: it becomes BF16 on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hma_serve.decode.kernels.byte_pages import BYTE_PAGES, BytePage
from hma_serve.decode.kernels.fragment_order import arrange_plain, restore_plain
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, CODED_INTEGER, FP8, INTEGER, MXFP8, PackedKind
from hma_serve.decode.kernels.placing import place
from hma_serve.decode.page_order import PageOrder, Role
from hma_serve.quant import GROUP_TOKENS

_KINDS = {
    (False, "tokens"): INTEGER,
    (False, "powers"): BLOCK_FLOAT,
    (False, "codes"): CODED_INTEGER,
    (True, "tokens"): FP8,
    (True, "powers"): MXFP8,
}


def packed_kind(page_format: str) -> PackedKind | None:
    """What the kernel must be told of a format's pages; None: in memory they are plain pages."""
    page = BYTE_PAGES.get(page_format)
    return None if page is None else _KINDS[page.floats, page.tail]


def fragment_page(page_format: str, role: Role, head_dim: int) -> PageOrder:
    """`PageOrders` of the attention kernel, for the formats that it reads and for BF16."""
    keys = role is Role.K
    if page_format == "bf16":
        return _PlainOrder(keys, head_dim)
    return _ByteOrder(keys, head_dim, BYTE_PAGES[page_format])


@dataclass(frozen=True, slots=True)
class _ByteOrder(PageOrder):
    keys: bool
    head_dim: int
    page: BytePage

    @property
    def page_bytes(self) -> int:
        return GROUP_TOKENS * self.head_dim + self.page.tail_bytes(self.head_dim)

    def arrange(self, wire: torch.Tensor, /) -> torch.Tensor:
        return self.page.arrange(wire, self.keys, self.head_dim)

    def restore(self, pages: torch.Tensor, /) -> torch.Tensor:
        return self.page.restore(pages, self.keys, self.head_dim)

    def place(self, units: torch.Tensor, pages: torch.Tensor, addresses: torch.Tensor, heads: slice) -> None:
        if units.is_cuda:
            place(self.page, self.keys, self.head_dim, units, pages, addresses, heads.start or 0)
        else:
            PageOrder.place(self, units, pages, addresses, heads)


@dataclass(frozen=True, slots=True)
class _PlainOrder(PageOrder):
    keys: bool
    head_dim: int

    @property
    def page_bytes(self) -> int:
        return 2 * GROUP_TOKENS * self.head_dim

    def arrange(self, wire: torch.Tensor, /) -> torch.Tensor:
        values = wire.contiguous().view(torch.int16).unflatten(-1, (GROUP_TOKENS, self.head_dim))
        return arrange_plain(values, self.keys).view(torch.uint8)

    def restore(self, pages: torch.Tensor, /) -> torch.Tensor:
        values = restore_plain(pages.contiguous().view(torch.int16), self.keys, self.head_dim)
        return values.flatten(-2).view(torch.uint8)
