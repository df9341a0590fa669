"""Codecs whose unit is its elements, then its scales: the generic, the OCP and the NVIDIA formats.

Divisors are tensors, never Python numbers: dividing by a number multiplies with its reciprocal on some devices, and
scales would differ in their last bit.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec
from hma_serve.quant.packing import pack_codes

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE: Final = 2.0**-126


class ScaledCodec(TorchCodec):
    """Elements of 8 or 4 bits, then scales, per unit.

    Attributes:
        element_bits: 8 or 4.
        channels: head_dim is a multiple of this.
    """

    element_bits: int
    channels: int = 32

    @abstractmethod
    def scale_bytes(self, head_dim: int) -> int:
        """Bytes of a unit's scales and zero points."""

    @abstractmethod
    def head_dim_of(self, unit_bytes: int) -> int:
        """The head_dim whose units are this large, if there is one."""

    @abstractmethod
    def _pack(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [units, 32, head_dim] and scale bytes of float32 [units, 32, head_dim]."""

    @abstractmethod
    def _values(self, elements: Tensor, scales: Tensor, head_dim: int) -> Tensor:
        """Float32 [units * 32, head_dim] of packed elements and scale bytes, one row a unit."""

    def element_bytes(self, head_dim: int) -> int:
        """Bytes of a unit's elements."""
        return GROUP_TOKENS * head_dim * self.element_bits // 8

    def group_bytes(self, head_dim: int) -> int:
        """Elements and scales."""
        return self.element_bytes(head_dim) + self.scale_bytes(head_dim)

    def _encode(self, x: Tensor, rounding: Rounding) -> Tensor:
        self._check(x.shape[2], rounding)
        if not len(x):
            return x.new_empty((0, self.group_bytes(x.shape[2])), dtype=torch.uint8)
        return self._join(*self._pack(x.float()))

    def _check(self, head_dim: int, rounding: Rounding) -> None:
        if rounding != "nearest_even":
            raise ValueError(f"{self.name} rounds to nearest even only")
        if head_dim % self.channels:
            raise ValueError(f"{self.name} needs a multiple of {self.channels} channels, not {head_dim}")

    def _join(self, codes: Tensor, scales: Tensor) -> Tensor:
        elements = pack_codes(codes, self.element_bits).flatten(1)
        return torch.cat([elements, scales], dim=1)

    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        head_dim = self.head_dim_of(packed.shape[1])
        if head_dim % self.channels or self.group_bytes(head_dim) != packed.shape[1]:
            raise ValueError(f"{self.name} has no units of {packed.shape[1]} bytes")
        if not len(packed):
            return packed.new_empty((0, head_dim), dtype=dtype)
        split = self.element_bytes(head_dim)
        return self._values(packed[:, :split], packed[:, split:], head_dim).to(dtype)


def divide(x: Tensor, divisor: float) -> Tensor:
    """Correctly rounded on every device."""
    return x / torch.full((), divisor, dtype=torch.float32, device=x.device)


def to_bytes(scales: Tensor) -> Tensor:
    """[units, n] of any dtype to uint8 [units, n * item size]."""
    return scales.contiguous().view(torch.uint8)


def from_bytes(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_bytes`; copies, because bytes of a message may stand anywhere."""
    return scales.clone(memory_format=torch.contiguous_format).view(dtype)


_E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDDLES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@lru_cache(maxsize=16)
def _e2m1_limits(device: torch.device) -> Tensor:
    # Ties go to the even code: above an odd one they round up, so those limits lie just below the middle.
    limits = torch.tensor(_E2M1_MIDDLES)
    limits[1::2] = torch.nextafter(limits[1::2], torch.zeros(()))
    return limits.to(device)


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes 0 to 15, uint8, nearest even, saturating."""
    codes = torch.bucketize(values.abs(), _e2m1_limits(values.device), out_int32=True)
    return (codes | (values.signbit().int() << 3)).to(torch.uint8)


@lru_cache(maxsize=16)
def _e2m1_pairs(device: torch.device) -> Tensor:
    half = torch.tensor(_E2M1_VALUES)
    values = torch.cat([half, -half])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).to(device)


def decode_e2m1(packed: Tensor) -> Tensor:
    """Float32 [bytes, 2] of packed codes, uint8 of any shape."""
    return _e2m1_pairs(packed.device).index_select(0, packed.reshape(-1).int())
