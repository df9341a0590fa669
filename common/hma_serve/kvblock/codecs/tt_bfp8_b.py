"""`tt_bfp8_b`: Tenstorrent's 8-bit block float, (head_dim / 32) tiles of 1088 bytes a unit, as in its own caches.

Element: sign and 7 magnitude bits with an explicit leading bit; value = +-magnitude * 2^(E - 133), E shared
by 16 channels of one token. The encoder is the vendor's host packer's: E is the largest exponent of the 16,
rounding that overflows saturates, zeros and subnormals become 0x00.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hma_serve.kvblock.codecs.base import Codec, check_encodable, check_multiple_of_32
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
    KV_CODEC_ID_TT_BFP8_B,
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding

TILE_BYTES: Final = EXPONENT_BYTES + TILE * TILE
_MAGNITUDE_BITS: Final = 7
_LARGEST: Final = 127
_BANNED_ELEMENT: Final = -128  # 0x80, a negative zero
_TILE_LAYOUT: Final = np.dtype(
    [("exponents", np.uint8, (2, 2, FACE)), ("elements", np.uint8, (2, 2, FACE, FACE))],
)
_SIGNED: Final = np.where(np.arange(256) < 128, np.arange(256), 128 - np.arange(256)).astype(np.float32)


class TtBfp8B(Codec):
    """Unit: head_dim / 32 tiles. Bans element 0x80 and exponent 255; either rounding to nearest."""

    id = KV_CODEC_ID_TT_BFP8_B
    name = "tt_bfp8_b"

    def group_bytes(self, head_dim: int) -> int:
        """34 bytes a channel."""
        return head_dim // TILE * TILE_BYTES

    def check_geometry(self, head_dim: int) -> None:
        """Multiples of 32."""
        check_multiple_of_32(self.name, head_dim)

    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """Bit for bit the vendor's host packer (nearest even), or its chip's packer (nearest, ties away)."""
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        self.check_geometry(head_dim)
        faces = to_faces(np.asarray(values, dtype=np.float32))
        exponents = shared_exponents(faces)
        scaled = normalised(faces, exponents) * np.float32(2.0 ** (_MAGNITUDE_BITS - 2))
        magnitude = np.minimum(_round(np.abs(scaled), rounding), _LARGEST).astype(np.uint8)
        sign = np.where((scaled < 0) & (magnitude > 0), 0x80, 0).astype(np.uint8)
        tiles = np.empty(faces.shape[:3], dtype=_TILE_LAYOUT)
        tiles["exponents"] = exponents[..., 0]
        tiles["elements"] = magnitude | sign
        return tiles.view(np.uint8).reshape(heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim))

    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        tiles = payload.view(_TILE_LAYOUT).reshape(heads, tokens // GROUP_TOKENS, head_dim // TILE)
        step = steps(tiles["exponents"], _MAGNITUDE_BITS)
        with np.errstate(invalid="ignore"):  # only a banned exponent gives 0 * Inf
            return from_faces(_SIGNED[tiles["elements"]] * step[..., None])

    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        tiles = payload.reshape(-1, TILE_BYTES)
        if int(tiles[:, :EXPONENT_BYTES].max()) == BANNED_EXPONENT:
            return "exponent 255"
        if int(tiles.view(np.int8)[:, EXPONENT_BYTES:].min()) == _BANNED_ELEMENT:
            return "element 0x80"
        return ""


def _round(magnitude: NDArray[np.float32], rounding: KvRounding.ValueType) -> NDArray[np.float32]:
    if rounding == KV_ROUNDING_NEAREST_EVEN:
        return np.rint(magnitude)
    if rounding == KV_ROUNDING_NEAREST_AWAY:
        whole = np.floor(magnitude)  # magnitude + 0.5 could itself round up
        return whole + (magnitude - whole >= 0.5)
    raise ValueError("tt_bfp8_b rounds to nearest, ties to even or away")
