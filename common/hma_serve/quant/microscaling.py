"""`mxfp8_e4m3`, `mxint8`, `mxfp4` and `nvfp4` on tensors: small groups of channels with scales of eight bits."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from hma_serve.quant.base import GROUP_TOKENS
from hma_serve.quant.scaled import (
    SMALLEST_SCALE,
    ScaledCodec,
    decode_e2m1,
    divide,
    encode_e2m1,
    from_bytes,
    to_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

_MX_GROUP: Final = 32
_NV_GROUP: Final = 16
_E4M3_LARGEST: Final = 448.0
_E2M1_LARGEST: Final = 6.0


@lru_cache(maxsize=16)
def _powers(device: torch.device) -> Tensor:
    """By E8M0 code, 2^(code - 127), NaN at 255. float32 [256]."""
    bits = torch.arange(256, dtype=torch.int32) << 23
    bits[0] = 1 << 22  # 2^-127 is subnormal
    powers = bits.view(torch.float32)
    powers[255] = torch.nan
    return powers.to(device)


class MxCodec(ScaledCodec):
    """One E8M0 scale per 32 channels of a token.

    Attributes:
        top_exponent: Exponent of the largest element.
    """

    top_exponent: int

    @abstractmethod
    def _round(self, scaled: Tensor) -> Tensor:
        """Codes, uint8, of values below 2^(top_exponent + 1)."""

    @abstractmethod
    def _elements(self, packed: Tensor) -> Tensor:
        """Float32, in a new tensor of any shape, of packed elements in order."""

    def scale_bytes(self, head_dim: int) -> int:
        """One byte per 32 channels of a token."""
        return head_dim

    def head_dim_of(self, unit_bytes: int) -> int:
        """See `ScaledCodec`."""
        return unit_bytes // (4 * self.element_bits + 1)

    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        groups = units.reshape(len(units), -1, _MX_GROUP)
        codes, scales = self._scaled(groups)
        return codes.view(units.shape), scales.to(torch.uint8)

    def round_trip(self, x: Tensor) -> Tensor:
        """What `decode(encode(x))` gives, without packing: float32 [..., n] of float32 [..., n], n a multiple of 32."""
        groups = x.contiguous().view(-1, _MX_GROUP)
        codes, scales = self._scaled(groups)
        return self._elements(codes).mul_(_powers(x.device).index_select(0, scales).unsqueeze(1)).view(x.shape)

    def _scaled(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, uint8 [..., 32], and E8M0 scales, int32 [...], of float32 groups [..., 32]."""
        largest = groups.abs().view(torch.int32).amax(-1)  # magnitudes order as their bits do
        scales = ((largest >> 23) - self.top_exponent).clamp(0, 254)
        powers = _powers(groups.device).index_select(0, (254 - scales).view(-1))
        return self._round(groups * powers.view(*scales.shape, 1)), scales

    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        powers = _powers(scales.device).index_select(0, scales.reshape(-1).int())
        return self._elements(elements).view(-1, _MX_GROUP).mul_(powers.unsqueeze(1)).view(-1, head_dim)


class MxFp8(MxCodec):
    """E4M3FN elements."""

    name = "mxfp8_e4m3"
    element_bits = 8
    top_exponent = 8

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled.clamp_(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

    def _elements(self, packed: Tensor) -> Tensor:
        return packed.view(torch.float8_e4m3fn).float()


class MxInt8(MxCodec):
    """Two's complement with an implied 2^-6."""

    name = "mxint8"
    element_bits = 8
    top_exponent = 0

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled.mul_(64.0).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)

    def _elements(self, packed: Tensor) -> Tensor:
        return packed.view(torch.int8).float().mul_(2.0**-6)


class MxFp4(MxCodec):
    """E2M1 elements, two a byte."""

    name = "mxfp4"
    element_bits = 4
    top_exponent = 2

    def _round(self, scaled: Tensor) -> Tensor:
        return encode_e2m1(scaled)

    def _elements(self, packed: Tensor) -> Tensor:
        return decode_e2m1(packed)


class NvFp4(ScaledCodec):
    """E2M1 elements, an E4M3 scale per 16 channels of a token, a float32 scale per unit."""

    name = "nvfp4"
    element_bits = 4

    def scale_bytes(self, head_dim: int) -> int:
        """One byte per 16 channels of a token, and four."""
        return 2 * head_dim + 4

    def head_dim_of(self, unit_bytes: int) -> int:
        """See `ScaledCodec`."""
        return (unit_bytes - 4) // 18

    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        groups = units.reshape(len(units), -1, _NV_GROUP)
        largest = groups.abs().amax(-1)
        unit_scale = divide(largest.amax(-1, keepdim=True), _E2M1_LARGEST * _E4M3_LARGEST).clamp(min=SMALLEST_SCALE)
        scales = (divide(largest, _E2M1_LARGEST) / unit_scale).clamp(max=_E4M3_LARGEST).to(torch.float8_e4m3fn)
        step = (scales.float() * unit_scale).unsqueeze(2)
        scaled = torch.where(step > 0, groups / step.clamp(min=SMALLEST_SCALE), 0.0)
        codes = encode_e2m1(scaled).view(units.shape)
        return codes, torch.cat([scales.view(torch.uint8), to_bytes(unit_scale)], dim=1)

    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        groups = GROUP_TOKENS * head_dim // _NV_GROUP
        block = scales[:, :groups].view(torch.float8_e4m3fn).float()
        values = decode_e2m1(elements).view(-1, groups, _NV_GROUP).mul_(block.unsqueeze(2))  # exact
        return values.mul_(from_bytes(scales[:, groups:], torch.float32).unsqueeze(2)).view(-1, head_dim)
