"""`f32`: IEEE binary32, little-endian, row-major. Exact, so that tests can separate the system from its codecs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hma_serve.kvblock.codecs.base import Codec, check_encodable, check_positive
from hma_serve.kvblock.limits import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_CODEC_ID_F32, KV_ROUNDING_NEAREST_EVEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hma_serve.v1.kv_block_pb2 import KvRounding

_FIRST_BANNED = 0x7F7F8000
"""The smallest magnitude that rounds to Inf in BF16, in which receivers may compute."""


class F32(Codec):
    """Unit: 32 tokens x head_dim float32. Bans Inf, NaN, and what BF16 would make Inf."""

    id = KV_CODEC_ID_F32
    name = "f32"
    rounds = False

    def group_bytes(self, head_dim: int) -> int:
        """128 bytes a channel."""
        return GROUP_TOKENS * head_dim * 4

    def check_geometry(self, head_dim: int) -> None:
        """Any positive head_dim."""
        check_positive(self.name, head_dim)

    def encode(
        self, values: NDArray[np.float32], rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN
    ) -> NDArray[np.uint8]:
        """Nothing is rounded, so every `rounding` is the same; a value that BF16 would make Inf is refused."""
        del rounding
        check_encodable(values)
        heads, tokens, head_dim = values.shape
        words = np.ascontiguousarray(values, dtype="<f4")
        packed = words.view(np.uint8).reshape(heads, tokens // GROUP_TOKENS, self.group_bytes(head_dim))
        if packed.size and self._find_banned(packed.reshape(-1), head_dim):
            raise ValueError("a value is too large for f32, whose readers may compute in bfloat16")
        return packed

    def _decode(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        return payload.view("<f4").reshape(heads, tokens, head_dim).astype(np.float32)

    def _steps(self, payload: NDArray[np.uint8], heads: int, tokens: int, head_dim: int) -> NDArray[np.float32]:
        del payload
        return np.zeros((heads, tokens, head_dim), dtype=np.float32)

    def _find_banned(self, payload: NDArray[np.uint8], head_dim: int) -> str:
        del head_dim
        positive = int(payload.view("<i4").max()) >= _FIRST_BANNED
        negative = int(payload.view("<u4").max()) >= _FIRST_BANNED | 0x80000000
        return "Inf, NaN and what rounds to Inf in BF16" if positive or negative else ""
