"""`int8` with a scale per token and head, and `int4` with a scale and a zero point per 32 elements, on tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from hma_serve.quant.base import GROUP_TOKENS
from hma_serve.quant.packing import unpack_codes
from hma_serve.quant.scaled import SMALLEST_SCALE, ScaledCodec, divide, from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

_GROUP: Final = 32
_SMALLEST_HALF: Final = 2.0**-24


class Int8(ScaledCodec):
    """Two's complement bytes, then 32 float32 scales."""

    name = "int8"
    element_bits = 8
    channels = 1

    def scale_bytes(self, head_dim: int) -> int:
        """One float32 per token."""
        del head_dim
        return 4 * GROUP_TOKENS

    def head_dim_of(self, unit_bytes: int) -> int:
        """See `ScaledCodec`."""
        return unit_bytes // GROUP_TOKENS - 4

    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        scales = divide(units.abs().amax(-1), 127.0).clamp(min=SMALLEST_SCALE)
        codes = (units / scales.unsqueeze(2)).round_().clamp_(-127, 127).to(torch.int8)
        return codes.view(torch.uint8), to_bytes(scales)

    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        values = elements.view(torch.int8).float().view(-1, GROUP_TOKENS, head_dim)
        return values.mul_(from_bytes(scales, torch.float32).unsqueeze(2)).view(-1, head_dim)


class Int4(ScaledCodec):
    """Codes 0 to 15, two a byte, then half scales, then half zero points: value = code * scale + zero.

    Args:
        by_channel: The 32 tokens of a channel share a pair; otherwise 32 channels of a token do.
    """

    element_bits = 4

    def __init__(self, *, by_channel: bool) -> None:
        self.name = "int4.channel" if by_channel else "int4"
        self._by_channel = by_channel

    def scale_bytes(self, head_dim: int) -> int:
        """Two halves per 32 elements."""
        return 4 * head_dim

    def head_dim_of(self, unit_bytes: int) -> int:
        """See `ScaledCodec`."""
        return unit_bytes // 20

    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        groups, axis = (units, 1) if self._by_channel else (units.reshape(len(units), -1, _GROUP), 2)
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        zeros = low.half()
        scales = divide((high - zeros.float()).clamp(min=0), 15.0).half()
        steps = scales.float().clamp(min=_SMALLEST_HALF)
        codes = ((groups - zeros.float()) / steps).round_().clamp_(0, 15).nan_to_num_().to(torch.uint8)
        return codes.view(units.shape), torch.cat([to_bytes(part.flatten(1)) for part in (scales, zeros)], dim=1)

    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        half = from_bytes(scales, torch.float16).float()
        scale, zero = half[:, :head_dim], half[:, head_dim:]
        codes = _code_pairs(elements.device).index_select(0, elements.reshape(-1).int())
        if self._by_channel:
            values = codes.view(-1, GROUP_TOKENS, head_dim).mul_(scale.unsqueeze(1)).add_(zero.unsqueeze(1))
        else:
            values = codes.view(-1, head_dim, _GROUP).mul_(scale.unsqueeze(2)).add_(zero.unsqueeze(2))
        return values.view(-1, head_dim)


@lru_cache(maxsize=16)
def _code_pairs(device: torch.device) -> Tensor:
    """By byte, the two codes in it. float32 [256, 2]."""
    return unpack_codes(torch.arange(256, dtype=torch.uint8).unsqueeze(1), 4).float().to(device)
