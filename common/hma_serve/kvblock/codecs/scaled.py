"""What codecs with scales beside their elements share: where the scales lie in a unit, and which scales are banned.

A unit is its elements, token after token, then its scales, then its zero points: one section, so that a unit travels
as it rests and a receiver moves it as opaque bytes. A scale is a multiplier, positive or zero, and so small that no
element times its scale is beyond the largest BF16: whatever passed the checks decodes to a finite number everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import Codec, check_encodable
from hma_serve.kvblock.codecs.packing import pack_codes, unpack_codes
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_ROUNDING_NEAREST_EVEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding

LARGEST_BF16: Final = float(np.uint32(0x7F7F0000).view(np.float32))
SMALLEST_SCALE: Final = np.float32(2.0**-126)
"""What encoders write for a group of zeros, too: dividing by it is always defined."""


class ScaledCodec(Codec):
    """Elements of 8 or 4 bits, then `scale_bytes` of scales, per unit.

    Attributes:
        element_bits: 8 or 4.
    """

    element_bits: int

    @abstractmethod
    def scale_bytes(self, head_dim: int) -> int:
        """Bytes of a unit's scales and zero points."""

    @abstractmethod
    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Codes [units, 32, head_dim] and scale bytes [units, scale_bytes] of float32 [units, 32, head_dim]."""

    @abstractmethod
    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The inverse of `_pack`, float32."""

    @abstractmethod
    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`steps` of the values that `_values` gives, in their shape."""

    @abstractmethod
    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        """Say which banned scale there is among uint8 [units, scale_bytes], or return an empty string."""

    def _banned_element(self, elements: NDArray[np.uint8]) -> str:
        """Say which banned code there is among the packed elements; most codecs have none."""
        del elements
        return ""

    def element_bytes(self, head_dim: int) -> int:
        """Bytes of a unit's elements."""
        return GROUP_TOKENS * head_dim * self.element_bits // 8

    def group_bytes(self, head_dim: int) -> int:
        """Elements and scales."""
        return self.element_bytes(head_dim) + self.scale_bytes(head_dim)

    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """To nearest, ties to even, with scales drawn from the values; the spec's informative encoder."""
        if rounding != KV_ROUNDING_NEAREST_EVEN:
            raise ValueError(f"{self.name} rounds to nearest even only")
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        self.check_geometry(head_dim)
        return self._units(np.asarray(values, dtype=np.float32)).reshape(
            heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim)
        )

    def _units(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        head_dim = values.shape[-1]
        if not values.size:
            return np.empty((0, self.group_bytes(head_dim)), dtype=np.uint8)
        with np.errstate(over="ignore"):  # refused below
            codes, scales = self._pack(np.ascontiguousarray(values).reshape(-1, GROUP_TOKENS, head_dim))
        if scales.size and self._banned_scale(scales, head_dim):
            raise ValueError(f"a value is too large for {self.name}")
        elements = pack_codes(codes, self.element_bits).reshape(len(codes), -1)
        return np.concatenate([elements, scales], axis=1)

    def _steps(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        elements, scales = self._parts(payload, head_dim)
        codes = unpack_codes(elements, self.element_bits).reshape(-1, GROUP_TOKENS, head_dim)
        with np.errstate(invalid="ignore", over="ignore"):
            return self._gaps(codes, scales).reshape(heads, tokens, head_dim)

    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        elements, scales = self._parts(payload, head_dim)
        codes = unpack_codes(elements, self.element_bits).reshape(-1, GROUP_TOKENS, head_dim)
        with np.errstate(invalid="ignore", over="ignore"):  # only from banned codes
            return self._values(codes, scales).reshape(heads, tokens, head_dim)

    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        elements, scales = self._parts(payload, head_dim)
        return self._banned_scale(scales, head_dim) or self._banned_element(elements)

    def _parts(self, payload: NDArray[np.uint8], head_dim: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        units = payload.reshape(-1, self.group_bytes(head_dim))
        split = self.element_bytes(head_dim)
        return units[:, :split], units[:, split:]


def largest_magnitude(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last axis, kept as an axis of 1."""
    largest: NDArray[np.float32] = np.abs(values).max(axis=-1, keepdims=True)
    return largest


def as_float32(scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Little-endian float32 out of rows of bytes."""
    return np.ascontiguousarray(scales).view("<f4").astype(np.float32, copy=False)


def as_bytes(scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The inverse of `as_float32`: [units, n] to [units, 4 * n]."""
    return np.ascontiguousarray(scales, dtype="<f4").view(np.uint8)


def banned_float32(scales: NDArray[np.uint8], largest_element: float) -> str:
    """Say whether a float32 scale is negative, NaN, or lifts the largest element beyond the largest BF16."""
    limit = np.float32(LARGEST_BF16 / largest_element)
    if float(limit) * largest_element > LARGEST_BF16:
        limit = np.nextafter(limit, np.float32(0))
    found = int(np.ascontiguousarray(scales).view("<u4").max())  # signs and NaN are the largest patterns
    return "scales that are negative, NaN or too large" if found > int(limit.view(np.uint32)) else ""
