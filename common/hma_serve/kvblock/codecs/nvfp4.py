"""`nvfp4`: E2M1 elements, an E4M3 scale per 16 channels of a token, and a float32 scale over those.

NVIDIA's second scale covers a tensor; here every unit carries its own, so that what is sent for a token does not depend
on tokens that were not yet computed, and a unit is readable alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import check_multiple_of_32
from hma_serve.kvblock.codecs.minifloat import E2M1, E4M3FN
from hma_serve.kvblock.codecs.scaled import SMALLEST_SCALE, ScaledCodec, as_bytes, as_float32, banned_float32
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_CODEC_ID_NVFP4

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP: Final = 16
_LARGEST: Final = np.float32(E2M1.largest * E4M3FN.largest)


class NvFp4(ScaledCodec):
    """Unit: packed elements, scales [token][channel / 16], one float32. Bans NaN and negative scales."""

    id = KV_CODEC_ID_NVFP4
    name = "nvfp4"
    element_bits = 4

    def scale_bytes(self, head_dim: int) -> int:
        """One byte per 16 channels of a token, and four."""
        return GROUP_TOKENS * (head_dim // GROUP) + 4

    def check_geometry(self, head_dim: int) -> None:
        """Multiples of 32."""
        check_multiple_of_32(self.name, head_dim)

    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        groups = units.reshape(len(units), -1, GROUP)
        largest = np.abs(groups).max(axis=-1)
        unit_scale = np.maximum(largest.max(axis=-1, keepdims=True) / _LARGEST, SMALLEST_SCALE)
        scales = E4M3FN.encode(largest / np.float32(E2M1.largest) / unit_scale)
        step = (E4M3FN.values[scales] * unit_scale)[..., None]
        scaled = np.where(step > 0, groups / np.maximum(step, SMALLEST_SCALE), 0).astype(np.float32)
        return E2M1.encode(scaled).reshape(units.shape), np.concatenate([scales, as_bytes(unit_scale)], axis=1)

    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _scaled(E2M1.values[codes], scales)

    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _scaled(E2M1.gaps[codes], scales)

    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        if int(scales[:, :-4].max()) > 0x7E:
            return "scales that are negative or NaN"
        return banned_float32(scales[:, -4:], float(_LARGEST))


def _scaled(elements: NDArray[np.float32], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    groups = elements.reshape(len(elements), -1, GROUP) * E4M3FN.values[scales[:, :-4]][..., None]  # exact
    values: NDArray[np.float32] = groups * as_float32(scales[:, -4:])[..., None]
    return values.reshape(elements.shape)
