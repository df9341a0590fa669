"""`int8` with a scale per token and head, and `int4` with a scale and a zero point per 32 elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import check_multiple_of_32, check_positive
from hma_serve.kvblock.codecs.scaled import (
    SMALLEST_SCALE,
    ScaledCodec,
    as_bytes,
    as_float32,
    banned_float32,
    largest_magnitude,
)
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import (
    KV_CODEC_ID_INT4,
    KV_CODEC_ID_INT8,
    KV_SCALE_GRANULARITY_CHANNEL_GROUP,
    KV_SCALE_GRANULARITY_TOKEN_GROUP,
    KV_SCALE_GRANULARITY_TOKEN_HEAD,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvScaleGranularity

GROUP: Final = 32
_FIRST_NON_FINITE_HALF: Final = 0x7C00


class Int8(ScaledCodec):
    """Unit: 32 x head_dim two's complement bytes, then 32 float32 scales. The encoder never writes -128."""

    id = KV_CODEC_ID_INT8
    name = "int8"
    granularity = KV_SCALE_GRANULARITY_TOKEN_HEAD
    element_bits = 8

    def scale_bytes(self, head_dim: int) -> int:
        """One float32 per token."""
        del head_dim
        return 4 * GROUP_TOKENS

    def check_geometry(self, head_dim: int) -> None:
        """Any positive head_dim."""
        check_positive(self.name, head_dim)

    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        scales = np.maximum(largest_magnitude(units) / np.float32(127), SMALLEST_SCALE)
        codes = np.clip(np.rint(units / scales), -127, 127).astype(np.int8)
        return codes.view(np.uint8), as_bytes(scales[..., 0])

    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return codes.view(np.int8).astype(np.float32) * as_float32(scales)[..., None]

    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.broadcast_to(as_float32(scales)[..., None], codes.shape)

    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        return banned_float32(scales, 128)


class Int4(ScaledCodec):
    """Unit: packed codes 0 to 15, then IEEE half scales, then as many half zero points: value = code * scale + zero.

    TOKEN_GROUP: 32 neighbouring channels of a token share a pair, [token][channel / 32]. CHANNEL_GROUP: the 32 tokens
    of a channel do, [channel]; made for keys, whose outliers keep to channels (KIVI).

    Args:
        granularity: Which of the two.
    """

    id = KV_CODEC_ID_INT4
    element_bits = 4

    def __init__(self, granularity: KvScaleGranularity.ValueType) -> None:
        self.granularity = granularity
        self._by_channel = granularity == KV_SCALE_GRANULARITY_CHANNEL_GROUP
        self.name = "int4.channel" if self._by_channel else "int4"

    def scale_bytes(self, head_dim: int) -> int:
        """Two halves per 32 elements."""
        return 4 * head_dim

    def check_geometry(self, head_dim: int) -> None:
        """Multiples of 32."""
        check_multiple_of_32(self.name, head_dim)

    def _groups(self, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view [units, groups, 32] with the elements that share a scale along the last axis."""
        return units.swapaxes(1, 2) if self._by_channel else units.reshape(len(units), -1, GROUP)

    def _ungroup(self, groups: NDArray[np.generic], head_dim: int) -> NDArray[np.generic]:
        return groups.swapaxes(1, 2) if self._by_channel else groups.reshape(len(groups), GROUP_TOKENS, head_dim)

    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        groups = self._groups(units)
        zeros = groups.min(axis=-1).astype("<f2")
        above = groups.max(axis=-1) - zeros.astype(np.float32)
        scales = (np.maximum(above, 0) / np.float32(15)).astype("<f2")
        with np.errstate(invalid="ignore"):  # values beyond a half's range: refused by the caller
            steps = np.maximum(scales.astype(np.float32), np.float32(2.0**-24))[..., None]
            codes = np.clip(np.rint((groups - zeros.astype(np.float32)[..., None]) / steps), 0, 15)
        whole = np.nan_to_num(codes).astype(np.uint8)
        packed = np.ascontiguousarray(self._ungroup(whole, units.shape[2])).view(np.uint8)
        return packed, np.concatenate([scales.view(np.uint8), zeros.view(np.uint8)], axis=1)

    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        scale, zero = (part.astype(np.float32)[..., None] for part in self._halves(scales))
        values = self._groups(codes.astype(np.float32)) * scale + zero
        return np.ascontiguousarray(self._ungroup(values, codes.shape[2]), dtype=np.float32)

    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        scale, zero = self._halves(scales)
        steps = (scale.astype(np.float32) + np.spacing(np.abs(zero)).astype(np.float32))[..., None]  # zero is rounded
        groups = self._groups(np.zeros(codes.shape, dtype=np.float32)) + steps
        return np.ascontiguousarray(self._ungroup(groups, codes.shape[2]), dtype=np.float32)

    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        scale, zero = (part.view("<u2") for part in self._halves(scales))
        if int(scale.max()) >= _FIRST_NON_FINITE_HALF:
            return "scales that are negative, infinite or NaN"
        return "zero points that are infinite or NaN" if _has_non_finite(zero) else ""

    @staticmethod
    def _halves(scales: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        halves = np.ascontiguousarray(scales).view("<f2")
        middle = halves.shape[1] // 2
        return np.ascontiguousarray(halves[:, :middle]), np.ascontiguousarray(halves[:, middle:])


def all_int4() -> tuple[Int4, ...]:
    """Both groupings."""
    return Int4(KV_SCALE_GRANULARITY_TOKEN_GROUP), Int4(KV_SCALE_GRANULARITY_CHANNEL_GROUP)


def _has_non_finite(halves: NDArray[np.uint16]) -> bool:
    return int((halves & np.uint16(0x7FFF)).max()) >= _FIRST_NON_FINITE_HALF
