"""`mxfp8_e4m3`, `mxint8`, `mxfp4`: the OCP microscaling formats 1.0, one E8M0 scale per 32 channels of a token.

E8M0 is 2^(code - 127), NaN at 255. OCP leaves the byte layout open; the format fixes it: elements, then scales in the
order [token][channel / 32].
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import check_multiple_of_32
from hma_serve.kvblock.codecs.minifloat import E2M1, E4M3FN, MiniFloat
from hma_serve.kvblock.codecs.scaled import ScaledCodec
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_CODEC_ID_MXFP4, KV_CODEC_ID_MXFP8_E4M3, KV_CODEC_ID_MXINT8

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP: Final = 32
E8M0: Final = np.concatenate([2.0 ** np.arange(-127.0, 128.0), [np.nan]]).astype(np.float32)
"""What every scale code means."""


class MxCodec(ScaledCodec):
    """Unit: elements, then 32 x head_dim / 32 scales. Bans scale codes with which an element could overflow, and NaN.

    Attributes:
        top_exponent: Exponent of the largest element.
        largest_scale: The largest code that may travel: beyond it an element could exceed float32.
    """

    top_exponent: int
    largest_scale: int

    def scale_bytes(self, head_dim: int) -> int:
        """One byte per 32 channels of a token."""
        return GROUP_TOKENS * (head_dim // GROUP)

    def check_geometry(self, head_dim: int) -> None:
        """Multiples of 32."""
        check_multiple_of_32(self.name, head_dim)

    @abstractmethod
    def _round(self, scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes of values below 2^(top_exponent + 1)."""

    @abstractmethod
    def _elements(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the codes mean before scaling."""

    @abstractmethod
    def _element_gaps(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`_gaps` before scaling."""

    def _pack(self, units: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        groups = units.reshape(len(units), -1, GROUP)
        exponents = (groups.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32)
        scales = np.clip(exponents.max(axis=-1) - self.top_exponent, 0, 254).astype(np.uint8)
        scaled = groups * E8M0[254 - scales][..., None]
        return self._round(scaled).reshape(units.shape), scales

    def _values(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _scaled(self._elements(codes), scales)

    def _gaps(self, codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
        return _scaled(self._element_gaps(codes), scales)

    def _banned_scale(self, scales: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        return f"scales above {self.largest_scale}" if int(scales.max()) > self.largest_scale else ""


def _scaled(elements: NDArray[np.float32], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Elements [units, 32, D] times what E8M0 scales, one per 32 of them, mean."""
    values: NDArray[np.float32] = elements.reshape(len(elements), -1, GROUP) * E8M0[scales][..., None]
    return values.reshape(elements.shape)


class MxFloat(MxCodec):
    """MX with floating elements."""

    element: MiniFloat

    def _round(self, scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.element.encode(scaled)

    def _elements(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.element.values[codes]
        return values

    def _element_gaps(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        gaps: NDArray[np.float32] = self.element.gaps[codes]
        return gaps


class MxFp8(MxFloat):
    """E4M3FN elements; NaN is banned."""

    id = KV_CODEC_ID_MXFP8_E4M3
    name = "mxfp8_e4m3"
    element_bits = 8
    element = E4M3FN
    top_exponent = 8
    largest_scale = 246

    def _banned_element(self, elements: NDArray[np.uint8]) -> str:
        return "NaN" if E4M3FN.has_banned(elements) else ""


class MxFp4(MxFloat):
    """E2M1 elements, the even channel in the lower half of a byte."""

    id = KV_CODEC_ID_MXFP4
    name = "mxfp4"
    element_bits = 4
    element = E2M1
    top_exponent = 2
    largest_scale = 252


class MxInt8(MxCodec):
    """Two's complement with an implied 2^-6. The encoder never writes -128, which is -2.0."""

    id = KV_CODEC_ID_MXINT8
    name = "mxint8"
    element_bits = 8
    top_exponent = 0
    largest_scale = 253

    def _round(self, scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] = np.clip(np.rint(scaled * np.float32(64)), -127, 127).astype(np.int8).view(np.uint8)
        return codes

    def _elements(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return codes.view(np.int8).astype(np.float32) * np.float32(1 / 64)

    def _element_gaps(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full(codes.shape, 1 / 64, dtype=np.float32)
