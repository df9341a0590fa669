"""Puts units that arrived into pages, in the order of the attention kernel: `BytePage.arrange` and a scatter at once.

Two limits: bytes, a block's once read and once written (2.2 MB of 2,048 tokens of the 8B's keys: 1 us at 4.3 TB/s), and
operations, about ten on integers a byte, as much. In fact launches bind it: what counts is that it is one and not ten,
since the engine's thread makes them between two steps. Exact: bit for bit what `BytePage.arrange` gives.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.kernels.byte_pages import BytePage

_ADDRESS_BYTES = tl.constexpr(16)
_FLOAT_BYTES = 4


@triton.jit(do_not_specialize=["ADDRESSES", "first_head"])
def _place(
    UNITS,  # uint8 [heads, groups, UNIT]
    ADDRESSES,  # int64 [groups]: of pages, in 16 bytes
    MEMORY,  # uint8 [KV heads, head_bytes]: a layer's
    ELEMENTS,  # int32 [COUNT]: which of a unit's codes stands at each place of a page
    TAIL,  # int32: which byte of a unit stands at each place behind them; of a float32 the first
    CODES,  # uint8: what a code means
    head_bytes,
    first_head,
    UNIT: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    RECODE: tl.constexpr,
    FLIP: tl.constexpr,
    TAIL_COUNT: tl.constexpr,
    TAIL_PADDED: tl.constexpr,  # a power of two
    FLOATS: tl.constexpr,  # the tail's are float32, to be multiplied by FACTOR; else bytes, to be raised by RAISED
    RAISED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """One group of one head."""
    group, head = tl.program_id(0), tl.program_id(1)
    unit = UNITS + (head * tl.num_programs(0) + group).to(tl.int64) * UNIT
    page = MEMORY + (first_head + head).to(tl.int64) * head_bytes + tl.load(ADDRESSES + group) * _ADDRESS_BYTES
    place = tl.arange(0, COUNT)
    element = tl.load(ELEMENTS + place)
    if BITS == 8:
        code = tl.load(unit + element)
    else:
        each: tl.constexpr = 8 // BITS
        code = (tl.load(unit + element // each).to(tl.int32) >> (element % each * BITS)) & ((1 << BITS) - 1)
    if RECODE:
        code = tl.load(CODES + code)
    tl.store(page + place, (code.to(tl.int32) ^ FLIP).to(tl.uint8))
    place = tl.arange(0, TAIL_PADDED)
    there = place < TAIL_COUNT
    at = unit + tl.load(TAIL + place, mask=there, other=0)
    if FLOATS:
        bits = tl.load(at, mask=there, other=0).to(tl.int32)
        for i in tl.static_range(1, 4):
            bits |= tl.load(at + i, mask=there, other=0).to(tl.int32) << (8 * i)
        scale = (bits.to(tl.float32, bitcast=True) * FACTOR).to(tl.int32, bitcast=True)
        tl.store((page + COUNT).to(tl.pointer_type(tl.int32)) + place, scale, mask=there)
    else:
        byte = tl.load(at, mask=there, other=0).to(tl.int32) + RAISED
        tl.store(page + COUNT + place, byte.to(tl.uint8), mask=there)


@lru_cache(maxsize=64)
def _indices(page: BytePage, keys: bool, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """On the device: see `_place`."""
    elements, tail = page.places(keys, head_dim)
    if page.tail == "tokens":
        tail = tail[::_FLOAT_BYTES].expand(GROUP_TOKENS)
    codes = torch.tensor(page.codes or (0,), dtype=torch.uint8)
    return tuple(each.to(device) for each in (elements.int(), tail.int(), codes))


def place(
    page: BytePage,
    keys: bool,
    head_dim: int,
    units: torch.Tensor,
    pages: torch.Tensor,
    addresses: torch.Tensor,
    first_head: int,
) -> None:
    """Puts units into pages.

    Args:
        page: What they are.
        keys: Keys, otherwise values.
        head_dim: Channels.
        units: uint8 [heads, groups, group_bytes], contiguous, as on the wire.
        pages: uint8 [addresses, KV heads, page bytes]: a layer's, overlapping as addresses do.
        addresses: int64 [groups], of the pages; on the same device, or to be copied there.
        first_head: Of the units.
    """
    elements, tail, codes = _indices(page, keys, head_dim, units.device)
    heads, groups, unit_bytes = units.shape
    _place[(groups, heads)](
        units,
        addresses.to(units.device),
        pages,
        elements,
        tail,
        codes,
        pages.stride(1),
        first_head,
        UNIT=unit_bytes,
        COUNT=len(elements),
        BITS=page.bits,
        RECODE=page.codes is not None,
        FLIP=128 if keys and not page.floats else 0,
        TAIL_COUNT=len(tail),
        TAIL_PADDED=triton.next_power_of_2(len(tail)),
        FLOATS=page.tail == "tokens",
        RAISED=page.raised,
        FACTOR=page.factor,
        num_warps=4,
    )
