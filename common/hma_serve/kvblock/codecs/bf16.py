"""`bf16`: the upper half of IEEE binary32, little-endian, row-major. The fallback that every receiver accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.kvblock.codecs.base import Codec, check_encodable, check_positive
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_CODEC_ID_BF16, KV_ROUNDING_NEAREST_EVEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding

_FIRST_NON_FINITE = 0x7F80


class Bf16(Codec):
    """Unit: 32 tokens x head_dim bfloat16. Bans Inf and NaN."""

    id = KV_CODEC_ID_BF16
    name = "bf16"

    def group_bytes(self, head_dim: int) -> int:
        """64 bytes a channel."""
        return GROUP_TOKENS * head_dim * 2

    def check_geometry(self, head_dim: int) -> None:
        """Any positive head_dim."""
        check_positive(self.name, head_dim)

    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """To nearest, ties to even; a value that rounds to Inf is refused."""
        if rounding != KV_ROUNDING_NEAREST_EVEN:
            raise ValueError("bf16 rounds to nearest even only")
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        halves = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        packed = halves.view(np.uint8).reshape(heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim))
        if packed.size and self._find_banned(packed.reshape(-1), head_dim):
            raise ValueError("a value is too large for bfloat16")
        return packed

    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        bits = payload.view("<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(heads, tokens, head_dim)

    def _steps(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        return np.spacing(np.abs(self._decode(payload, heads, tokens, head_dim))) * np.float32(2**16)

    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        positive = int(payload.view("<i2").max()) >= _FIRST_NON_FINITE
        negative = int(payload.view("<u2").max()) >= _FIRST_NON_FINITE | 0x8000
        return "Inf and NaN" if positive or negative else ""
