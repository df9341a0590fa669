"""`fp8_e4m3fn`, `fp8_e4m3fnuz`, `fp8_e4m3_ieee`: three readings of eight bits, each with scales of three granularities.

All with float32 scales. TENSOR and HEAD repeat one scale in every unit it covers, so that a unit is readable alone
wherever it is cut out; the promise that they are equal lets a reader fold the scale into the softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import check_encodable, check_positive
from hma_serve.kvblock.codecs.minifloat import E4M3_IEEE, E4M3FN, E4M3FNUZ, MiniFloat
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
    KV_CODEC_ID_FP8_E4M3_IEEE,
    KV_CODEC_ID_FP8_E4M3FN,
    KV_CODEC_ID_FP8_E4M3FNUZ,
    KV_ROUNDING_NEAREST_EVEN,
    KV_SCALE_GRANULARITY_HEAD,
    KV_SCALE_GRANULARITY_TENSOR,
    KV_SCALE_GRANULARITY_TOKEN_HEAD,
    KvCodecId,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding, KvScaleGranularity

ELEMENTS: Final[dict[KvCodecId.ValueType, MiniFloat]] = {
    KV_CODEC_ID_FP8_E4M3FN: E4M3FN,
    KV_CODEC_ID_FP8_E4M3FNUZ: E4M3FNUZ,
    KV_CODEC_ID_FP8_E4M3_IEEE: E4M3_IEEE,
}
_SUFFIXES: Final = {
    KV_SCALE_GRANULARITY_TOKEN_HEAD: "",
    KV_SCALE_GRANULARITY_HEAD: ".head",
    KV_SCALE_GRANULARITY_TENSOR: ".tensor",
}


class Fp8(ScaledCodec):
    """Unit: 32 x head_dim bytes, then one float32 scale per token, or one in all. Bans Inf and NaN.

    Args:
        codec_id: Which reading.
        granularity: What a scale covers.
    """

    element_bits = 8

    def __init__(self, codec_id: KvCodecId.ValueType, granularity: KvScaleGranularity.ValueType) -> None:
        self.id = codec_id
        self.granularity = granularity
        self.name = KvCodecId.Name(codec_id).removeprefix("KV_CODEC_ID_").lower() + _SUFFIXES[granularity]
        self._element = ELEMENTS[codec_id]
        self._per_token = granularity == KV_SCALE_GRANULARITY_TOKEN_HEAD
        self.shared_bytes = 0 if self._per_token else 4

    def scale_bytes(self, head_dim: int) -> int:
        """One float32 per token, or one."""
        del head_dim
        return 4 * GROUP_TOKENS if self._per_token else 4

    def check_geometry(self, head_dim: int) -> None:
        """Any positive head_dim."""
        check_positive(self.name, head_dim)

    def encode(
        self,
        values: NDArray[np.float32],
        rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN,
        *,
        scale: NDArray[np.float32] | float | None = None,
    ) -> NDArray[np.uint8]:
        """To nearest even, saturating.

        Args:
            values: float32 [heads, tokens, head_dim].
            rounding: Nearest even.
            scale: Calibrated multiplier, one, or [heads] for HEAD. None: from the largest of `values`, which is right
                only if they are all that the granularity covers. TOKEN_HEAD always draws its scales from the values.
        """
        if self._per_token or rounding != KV_ROUNDING_NEAREST_EVEN:
            return super().encode(values, rounding)
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        self.check_geometry(head_dim)
        if scale is None:
            axes = (1, 2) if self.granularity == KV_SCALE_GRANULARITY_HEAD else None
            scale = self._scale(np.abs(values).max(axis=axes, initial=0.0).astype(np.float32))
        per_unit = np.repeat(np.broadcast_to(np.asarray(scale, np.float32), heads), tokens // GROUP_TOKENS)[:, None]
        if per_unit.size and self._banned_scale(as_bytes(per_unit), head_dim):
            raise ValueError(f"a value is too large for {self.name}")
        units = np.asarray(values, np.float32).reshape(-1, GROUP_TOKENS * head_dim)
        packed = np.concatenate([self._codes(units, per_unit), as_bytes(per_unit)], axis=1)
        return packed.reshape(heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim))

    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        scales = self._scale(largest_magnitude(units))
        return self._codes(units, scales), as_bytes(scales[..., 0])

    def _scale(self, largest: NDArray[np.float32]) -> NDArray[np.float32]:
        scale: NDArray[np.float32] = np.maximum(largest / np.float32(self._element.largest), SMALLEST_SCALE)
        return scale

    def _codes(self, values: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
        with np.errstate(over="ignore"):  # saturates
            return self._element.encode(values / scales)

    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._element.values[codes] * as_float32(scales)[..., None]
        return values

    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        gaps: NDArray[np.float32] = self._element.gaps[codes] * as_float32(scales)[..., None]
        return gaps

    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        return banned_float32(scales, self._element.largest)

    def _banned_element(self, elements: NDArray[np.uint8]) -> str:
        return "Inf and NaN" if self._element.has_banned(elements) else ""


def all_fp8() -> tuple[Fp8, ...]:
    """Every reading with every granularity."""
    return tuple(Fp8(codec_id, granularity) for codec_id in ELEMENTS for granularity in _SUFFIXES)
