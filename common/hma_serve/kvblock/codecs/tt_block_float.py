"""`tt_bfp8_b`, `tt_bfp4_b`, `tt_bfp2_b`: Tenstorrent's block float, head_dim / 32 tiles a unit, as in its own caches.

Element: sign and 7, 3 or 1 magnitude bits with an explicit leading bit; value = +-magnitude * 2^(E - 126 - magnitude
bits), E shared by 16 channels of one token. The encoder is the vendor's host packer's: E is the largest exponent of
the 16, rounding that overflows saturates, zeros and subnormals become zero codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import Codec, check_encodable, check_multiple_of_32
from hma_serve.kvblock.codecs.packing import pack_codes, unpack_codes
from hma_serve.kvblock.codecs.tt_tile import (
    BANNED_EXPONENT,
    EXPONENT_BYTES,
    FACE,
    TILE,
    from_faces,
    normalised,
    shared_exponents,
    steps,
    to_faces,
)
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import (
    KV_CODEC_ID_TT_BFP2_B,
    KV_CODEC_ID_TT_BFP4_B,
    KV_CODEC_ID_TT_BFP8_B,
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding

_IDS: Final = {8: KV_CODEC_ID_TT_BFP8_B, 4: KV_CODEC_ID_TT_BFP4_B, 2: KV_CODEC_ID_TT_BFP2_B}
_EIGHT_BIT_MAGNITUDE: Final = 7


class TtBlockFloat(Codec):
    """Unit: head_dim / 32 tiles. Bans the element that is a negative zero, and exponent 255.

    Args:
        bits: Of an element: 8, 4 or 2.
    """

    def __init__(self, bits: int) -> None:
        self.id = _IDS[bits]
        self.name = f"tt_bfp{bits}_b"
        self._bits = bits
        self._magnitude_bits = bits - 1
        self._sign = 1 << (bits - 1)
        self._tile_bytes = EXPONENT_BYTES + TILE * TILE * bits // 8
        self._layout = np.dtype(
            [("exponents", np.uint8, (2, 2, FACE)), ("elements", np.uint8, (2, 2, FACE, FACE * bits // 8))]
        )
        codes = np.arange(1 << bits)
        self._signed = np.where(codes < self._sign, codes, self._sign - codes).astype(np.float32)

    def group_bytes(self, head_dim: int) -> int:
        """34, 18 or 10 bytes a channel."""
        return head_dim // TILE * self._tile_bytes

    def check_geometry(self, head_dim: int) -> None:
        """Multiples of 32."""
        check_multiple_of_32(self.name, head_dim)

    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """Bit for bit the vendor's host packer (nearest even) or its chip's.

        The chip rounds 8-bit elements ties away (nearest away), and cuts 4-bit ones out of those (truncate).
        """
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        self.check_geometry(head_dim)
        faces = to_faces(np.asarray(values, dtype=np.float32))
        exponents = shared_exponents(faces)
        magnitude = self._magnitudes(np.abs(normalised(faces, exponents)), rounding)
        sign = np.where((faces < 0) & (magnitude > 0), self._sign, 0).astype(np.uint8)
        tiles = np.empty(faces.shape[:3], dtype=self._layout)
        tiles["exponents"] = exponents[..., 0]
        tiles["elements"] = pack_codes(magnitude | sign, self._bits)
        return tiles.view(np.uint8).reshape(heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim))

    def _magnitudes(self, normal: NDArray[np.float32], rounding: KvRounding.ValueType) -> NDArray[np.uint8]:
        """`normal` is |x| / 2^(E - 128), below 4."""
        if rounding == KV_ROUNDING_TRUNCATE and self._bits == 4:
            whole = _round(normal * np.float32(2.0 ** (_EIGHT_BIT_MAGNITUDE - 2)), KV_ROUNDING_NEAREST_AWAY)
            cut: NDArray[np.uint8] = np.minimum(whole, 127).astype(np.uint8) >> np.uint8(4)
            return cut
        whole = _round(normal * np.float32(2.0 ** (self._magnitude_bits - 2)), rounding)
        return np.minimum(whole, self._sign - 1).astype(np.uint8)

    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        tiles = payload.view(self._layout).reshape(heads, tokens // GROUP_TOKENS, head_dim // TILE)
        step = steps(tiles["exponents"], self._magnitude_bits)
        with np.errstate(invalid="ignore"):  # only a banned exponent gives 0 * Inf
            return from_faces(self._signed[unpack_codes(tiles["elements"], self._bits)] * step[..., None])

    def _steps(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        tiles = payload.view(self._layout).reshape(heads, tokens // GROUP_TOKENS, head_dim // TILE)
        step = steps(tiles["exponents"], self._magnitude_bits)[..., None]
        return from_faces(np.broadcast_to(step, (*step.shape[:-1], FACE)))

    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        tiles = payload.reshape(-1, self._tile_bytes)
        if int(tiles[:, :EXPONENT_BYTES].max()) == BANNED_EXPONENT:
            return "exponent 255"
        if self._has_negative_zero(tiles[:, EXPONENT_BYTES:]):
            return f"element {self._sign:#x}"
        return ""

    def _has_negative_zero(self, elements: NDArray[np.uint8]) -> bool:
        if self._bits == 8:
            return int(elements.view(np.int8).min()) == -128
        # 8 bytes at once: does an element with its sign flipped borrow when 1 is taken from each? The lowest that does
        # is 0 then, since none below it borrowed from it.
        ones = np.uint64(0x1111111111111111 if self._bits == 4 else 0x5555555555555555)
        signs = ones << np.uint64(self._magnitude_bits)
        flipped = elements.view(np.uint64) ^ signs
        return bool(((flipped - ones) & ~flipped & signs).any())


def _round(magnitude: NDArray[np.float32], rounding: KvRounding.ValueType) -> NDArray[np.float32]:
    if rounding == KV_ROUNDING_NEAREST_EVEN:
        return np.rint(magnitude)
    if rounding == KV_ROUNDING_NEAREST_AWAY:
        whole = np.floor(magnitude)  # magnitude + 0.5 could itself round up
        return whole + (magnitude - whole >= 0.5)
    raise ValueError("block float rounds to nearest, ties to even or away; 4-bit elements may be truncated 8-bit ones")
