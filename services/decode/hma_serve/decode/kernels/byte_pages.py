"""Formats whose pages are one byte an element under scales that the attention kernel knows.

`arrange` permutes, re-codes single elements and repeats scales; `restore` undoes that bit for bit, but for the sign
of zeros that are not BF16's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from hma_serve.decode.kernels.fragment_order import GROUP, fragment_elements, fragment_exponents
from hma_serve.quant import GROUP_TOKENS
from hma_serve.quant.packing import pack_codes, unpack_codes

_E2M1_IN_SIXTEENTHS = (0, 8, 16, 24, 32, 48, 64, 96)

_FLOAT_BYTES = 4
_UNIT_BYTES = 16

Layout = Literal["tile", "rows"]
Tail = Literal["powers", "tokens", "codes"]


@dataclass(frozen=True, slots=True)
class BytePage:
    """One format.

    Attributes:
        layout: `tile`: Tenstorrent's tiles; `rows`: elements in the order (token, channel), then scales.
        floats: Elements are E4M3 codes, otherwise integers.
        tail: Scales are biased exponents; a float32 per token; or E4M3 codes, and behind them a float32 of the page.
        bits: Of an element on the wire.
        codes: What an element's code means as an integer of the kernel; None: itself, in two's complement.
        scales: On the wire: per 16 channels, per 32, per token, or one of a unit (16, 32, 1 or 0 channels).
        raised: Added to exponents.
        factor: Of float32 scales, a power of two.
    """

    layout: Layout
    floats: bool
    tail: Tail
    bits: int = 8
    codes: tuple[int, ...] | None = None
    scales: int = GROUP
    raised: int = 0
    factor: float = 1.0

    def tail_bytes(self, head_dim: int) -> int:
        """Of a page's scales; a page is whole units of an address."""
        return {
            "powers": 2 * head_dim,
            "tokens": _FLOAT_BYTES * GROUP_TOKENS,
            "codes": 2 * head_dim + _UNIT_BYTES,
        }[self.tail]

    def places(self, keys: bool, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a unit, int64 on the host: the code at each place of a page, and the byte at each place behind them.

        Float32 scales stand as often as on the wire, one or one a token.
        """
        elements, scales = _host_places(self.layout, self.bits, self.scales, keys, head_dim)
        if self.tail == "codes":
            scales = torch.cat([scales, scales[-_FLOAT_BYTES:].repeat(_UNIT_BYTES // _FLOAT_BYTES - 1)])
        return elements, scales

    def arrange(self, units: torch.Tensor, keys: bool, head_dim: int) -> torch.Tensor:
        """uint8 [..., group_bytes] to uint8 [..., page bytes]."""
        elements, scales = _places(self.layout, self.bits, self.scales, keys, head_dim, units.device)
        codes = unpack_codes(units, self.bits) if self.bits < 8 else units
        page = codes.index_select(-1, elements)
        if self.codes is not None:
            page = _table(self.codes, units.device)[page.int()]
        if keys and not self.floats:
            page = page ^ 128
        if self.tail == "powers":
            tail = units.index_select(-1, scales) + self.raised
        elif self.tail == "codes":
            fine, unit = units.index_select(-1, scales).split((2 * head_dim, _FLOAT_BYTES), -1)
            tail = torch.cat([fine] + [unit] * (_UNIT_BYTES // _FLOAT_BYTES), -1)
        else:
            wide = _floats(units.index_select(-1, scales)) * self.factor
            tail = wide.expand(*wide.shape[:-1], GROUP_TOKENS).contiguous().view(torch.uint8)
        return torch.cat([page, tail], -1)

    def restore(self, pages: torch.Tensor, keys: bool, head_dim: int) -> torch.Tensor:
        """The inverse of `arrange`."""
        elements, scales = _places(self.layout, self.bits, self.scales, keys, head_dim, pages.device)
        page, tail = pages[..., : GROUP_TOKENS * head_dim], pages[..., GROUP_TOKENS * head_dim :]
        if keys and not self.floats:
            page = page ^ 128
        if self.codes is not None:
            page = _inverse(self.codes, pages.device)[page.int()]
        if self.tail == "powers":
            tail = tail - self.raised
        elif self.tail == "codes":
            tail = tail[..., : 2 * head_dim + _FLOAT_BYTES]
        else:
            wide = _floats(tail)[..., : GROUP_TOKENS if self.scales == 1 else 1] / self.factor
            tail = wide.contiguous().view(torch.uint8)
        size = int(max(elements.max() // (8 // self.bits), scales.max())) + 1
        codes = pages.new_zeros((*pages.shape[:-1], size * 8 // self.bits))
        codes[..., elements] = page
        units = pack_codes(codes, self.bits)
        units[..., scales] = tail
        return units


def _floats(raw: torch.Tensor) -> torch.Tensor:
    return raw.clone(memory_format=torch.contiguous_format).view(torch.float32)


def _sign_magnitude(bits: int) -> tuple[int, ...]:
    """Two's complement bytes of a block float's codes, in the units of 8 bits."""
    sign = 1 << (bits - 1)
    return tuple((code & (sign - 1)) * (-1 if code & sign else 1) * (128 // sign) & 255 for code in range(1 << bits))


def _e2m1() -> tuple[int, ...]:
    return (*_E2M1_IN_SIXTEENTHS, *(-value & 255 for value in _E2M1_IN_SIXTEENTHS))


@lru_cache(maxsize=16)
def _table(codes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.uint8, device=device)


@lru_cache(maxsize=16)
def _inverse(codes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    inverse = torch.zeros(256, dtype=torch.uint8)
    # Where two codes mean the same (the zeros), the first is meant.
    for code in reversed(range(len(codes))):
        inverse[codes[code]] = code
    return inverse.to(device)


@lru_cache(maxsize=64)
def _places(
    layout: Layout, bits: int, scales: int, keys: bool, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a page's elements (in codes) and scales (in bytes) stand in a unit, in the page's order.

    Kept on the device: to copy them there for each block would wait for whatever the device does at that time.
    """
    elements, exponents = _host_places(layout, bits, scales, keys, head_dim)
    return elements.to(device), exponents.to(device)


def _host_places(
    layout: Layout, bits: int, scales: int, keys: bool, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    element = fragment_elements(keys, head_dim, wide=False)
    exponent = fragment_exponents(keys, head_dim)
    groups = head_dim // GROUP
    token, channel = exponent // groups, exponent % groups * GROUP
    if layout == "tile":
        return _tile_element(element // head_dim, element % head_dim, bits), _tile_exponent(token, channel, bits)
    start = GROUP_TOKENS * head_dim * bits // 8
    if scales == 32:
        return element, start + token * (head_dim // 32) + channel // 32
    if scales == GROUP:
        behind = start + GROUP_TOKENS * groups
        codes = start + fragment_exponents(True, head_dim)
        return element, torch.cat([codes, torch.arange(behind, behind + _FLOAT_BYTES)])
    return element, torch.arange(start, start + 4 * (GROUP_TOKENS if scales == 1 else 1))


def _tile_exponent(token: torch.Tensor, channel: torch.Tensor, bits: int) -> torch.Tensor:
    face = token // 16 * 2 + channel % 32 // 16
    return channel // 32 * (64 + 128 * bits) + face * 16 + token % 16


def _tile_element(token: torch.Tensor, channel: torch.Tensor, bits: int) -> torch.Tensor:
    face = token // 16 * 2 + channel % 32 // 16
    bits_before = channel // 32 * (64 + 128 * bits) * 8 + 64 * 8
    return bits_before // bits + face * 256 + token % 16 * 16 + channel % 16


def _fp8(name: str, factor: float) -> dict[str, BytePage]:
    one = BytePage("rows", floats=True, tail="tokens", scales=0, factor=factor)
    each = BytePage("rows", floats=True, tail="tokens", scales=1, factor=factor)
    return {name: each, f"{name}.token_head": each, f"{name}.head": one, f"{name}.tensor": one}


BYTE_PAGES = {
    **{
        f"tt_bfp{bits}_b": BytePage("tile", floats=False, tail="powers", bits=bits, codes=_sign_magnitude(bits))
        for bits in (8, 4, 2)
    },
    "mxint8": BytePage("rows", floats=False, tail="powers", scales=32),
    "mxfp4": BytePage("rows", floats=False, tail="powers", bits=4, codes=_e2m1(), scales=32, raised=2),
    "nvfp4": BytePage("rows", floats=False, tail="codes", bits=4, codes=_e2m1(), scales=GROUP),
    "mxfp8_e4m3": BytePage("rows", floats=True, tail="powers", scales=32),
    "int8": BytePage("rows", floats=False, tail="tokens", scales=1),
    **_fp8("fp8_e4m3fn", 1.0),
    **_fp8("fp8_e4m3fnuz", 0.5),
    **_fp8("fp8_e4m3_ieee", 1.0),
}
"""By codec's name."""
