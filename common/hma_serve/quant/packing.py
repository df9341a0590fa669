"""Codes narrower than a byte on tensors: the first code stands in the lowest bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] of 8, 4 or 2 bits into bytes [..., n * bits / 8]."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    packed = codes[..., 0::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (place * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`."""
    if bits == 8:
        return packed
    codes = [packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(codes, dim=-1).flatten(-2)
