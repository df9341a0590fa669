"""K offsets: one vector per layer and KV head, subtracted from keys before they are packed.

Softmax does not change when all keys move by the same vector c and q.c is added back to the scores of those that
moved. Keys often carry a large constant per channel, which block formats pay for with the precision of everything
beside it; taking it out makes room. A table is a constant of the model and profile, never of a prompt: pages can
be shared between requests, and the first layer can leave before the last token is known. Its hash is part of the
fingerprint, so a pair with unlike tables is refused before anything is sent.

The calibration rule: over the keys of calibration prompts, as they are packed (after qk-norm and RoPE, in the order
of the producer's cache), c is the mean per channel, accumulated in float64 and rounded to bfloat16.
"""

from __future__ import annotations

import hashlib
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from google.protobuf.message import DecodeError

from hma_serve.kvblock.errors import BadOffset
from hma_serve.v1.kv_block_pb2 import KvOffset, KvOffsetTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

_SCHEME: Final = b"hma-serve k-offset 1\n"
MAX_TABLE_BYTES: Final = 64 << 20
"""Of a serialised table; read from files that people pass around."""


class OffsetTable:
    """Offsets of some layers and heads; what is not named has none.

    Args:
        vectors: By (layer, head), float32 [head_dim], finite.

    Raises:
        BadOffset: A vector is not one-dimensional or not finite.
    """

    def __init__(self, vectors: Mapping[tuple[int, int], NDArray[np.float32]]) -> None:
        for (layer, head), vector in vectors.items():
            if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
                raise BadOffset(f"layer {layer}, head {head}: not a vector of finite numbers", field="k_offsets")
        self.vectors: Final = MappingProxyType(
            {key: np.ascontiguousarray(vectors[key], dtype="<f4") for key in sorted(vectors)}
        )

    def __bool__(self) -> bool:
        return bool(self.vectors)

    def layer(self, layer: int, heads: int, head_dim: int) -> NDArray[np.float32]:
        """The offsets of one layer, float32 [heads, head_dim], zero where there are none."""
        out = np.zeros((heads, head_dim), dtype=np.float32)
        for head in range(heads):
            vector = self.vectors.get((layer, head))
            if vector is not None:
                out[head] = vector
        return out

    def array(self, layers: int, heads: int, head_dim: int) -> NDArray[np.float32]:
        """As `layer`, of all layers of a model whose layers are alike: float32 [layers, heads, head_dim]."""
        return np.stack([self.layer(layer, heads, head_dim) for layer in range(layers)])

    def check_shape(self, layers: int, heads: int, head_dim: int) -> None:
        """Refuse a table that a model whose layers are alike has no place for.

        Raises:
            BadOffset: Naming the vector.
        """
        for (layer, head), vector in self.vectors.items():
            if layer >= layers or head >= heads or vector.size != head_dim:
                raise BadOffset(
                    f"layer {layer}, head {head} has {vector.size} channels; the model has {layers} layers of {heads} "
                    f"heads with {head_dim}",
                    field="k_offsets",
                )

    def digest(self) -> str:
        """SHA-256 hex over layer, head, head_dim (uint32) and values (float32), little-endian, ascending."""
        digest = hashlib.sha256(_SCHEME)
        for (layer, head), vector in self.vectors.items():
            digest.update(struct.pack("<III", layer, head, vector.size))
            digest.update(vector.tobytes())
        return digest.hexdigest()

    def fingerprint(self, model_fingerprint: str) -> str:
        """What a producer with this table announces; without offsets the model's own fingerprint."""
        if not self:
            return model_fingerprint
        return hashlib.sha256(_SCHEME + f"{model_fingerprint}\n{self.digest()}\n".encode()).hexdigest()

    def to_proto(self) -> list[KvOffset]:
        """For a manifest."""
        return [
            KvOffset(layer=layer, head=head, values=vector.tobytes()) for (layer, head), vector in self.vectors.items()
        ]

    @classmethod
    def from_proto(cls, offsets: Iterable[KvOffset]) -> OffsetTable:
        """From a manifest or a table file.

        Raises:
            BadOffset: Repeated, not whole float32 or not finite.
        """
        vectors: dict[tuple[int, int], NDArray[np.float32]] = {}
        for index, offset in enumerate(offsets):
            key = (offset.layer, offset.head)
            if key in vectors:
                raise BadOffset(f"layer {offset.layer}, head {offset.head} is given twice", field=f"k_offsets[{index}]")
            if len(offset.values) % 4:
                raise BadOffset(f"{len(offset.values)} bytes are not float32", field=f"k_offsets[{index}].values")
            vectors[key] = np.frombuffer(offset.values, "<f4")
        return cls(vectors)

    def to_bytes(self, *, model_fingerprint: str, profile: str) -> bytes:
        """A table file: a serialised `KvOffsetTable`."""
        table = KvOffsetTable(model_fingerprint=model_fingerprint, profile=profile, offsets=self.to_proto())
        return table.SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes, *, model_fingerprint: str | None, profile: str | None) -> OffsetTable:
        """Read a table file.

        Args:
            data: The whole file.
            model_fingerprint: Of the model it is to be used with; None: any.
            profile: Of the producer; None: any.

        Raises:
            BadOffset: Too large, damaged, or of another model or profile.
        """
        if len(data) > MAX_TABLE_BYTES:
            raise BadOffset(f"{len(data)} bytes, the limit is {MAX_TABLE_BYTES}", field="k_offsets")
        try:
            table = KvOffsetTable.FromString(data)
        except DecodeError as error:
            raise BadOffset("not a KvOffsetTable", field="k_offsets") from error
        for field, found, wanted in (
            ("model_fingerprint", table.model_fingerprint, model_fingerprint),
            ("profile", table.profile, profile),
        ):
            if wanted is not None and found != wanted:
                raise BadOffset(f"the table was calibrated for {found[:80]!r}, not {wanted!r}", field=field)
        return cls.from_proto(table.offsets)


class OffsetCalibration:
    """Accumulates keys and gives the table: means per channel in float64, rounded to bfloat16."""

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, keys: NDArray[np.float32]) -> None:
        """Count keys in.

        Args:
            layer: Layer index in the model.
            keys: float32 [heads, tokens, head_dim], as they would be packed.
        """
        total = keys.sum(axis=1, dtype=np.float64)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._tokens[layer] = self._tokens.get(layer, 0) + keys.shape[1]

    def table(self) -> OffsetTable:
        """The offsets of everything that was added."""
        vectors = {}
        for layer, sums in self._sums.items():
            for head, mean in enumerate(sums / max(1, self._tokens[layer])):
                vectors[layer, head] = _to_bfloat16(mean.astype(np.float32))
        return OffsetTable(vectors)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)
