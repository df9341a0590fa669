"""How one layer of one chunk lies in a slot, known alike to the engine that writes it and the front that sends it.

A slot holds the keys [heads, groups, group bytes] and right after them the values in the same shape, both in the
codec's own bytes: the front cuts wire blocks out of it without looking inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import codec
from hma_serve.prefill.profiles import Profile
from hma_serve.v1.kv_block_pb2 import KV_ROLE_K, KV_ROLE_V

ROLES = (KV_ROLE_K, KV_ROLE_V)
"""In the order in which they lie in a slot and leave."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of packed KV.

    Attributes:
        layers: Layers of the model.
        heads: Key/value heads.
        group_bytes: Bytes of one head's 32 tokens, per role in the order of `ROLES`.
    """

    layers: int
    heads: int
    group_bytes: tuple[int, int]

    @classmethod
    def of(cls, model: ModelConfig, profile: Profile) -> KvLayout:
        """The layout of a model under a profile that fits it."""
        sizes = [codec(name).group_bytes(model.head_dim) for name in (profile.k_codec, profile.v_codec)]
        return cls(model.num_layers, model.num_kv_heads, (sizes[0], sizes[1]))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * self.layer_bytes(GROUP_TOKENS) // GROUP_TOKENS

    def layer_bytes(self, tokens: int, heads: int | None = None) -> int:
        """Bytes of one layer's keys and values for whole groups of tokens, all heads unless `heads` says otherwise."""
        return tokens // GROUP_TOKENS * (self.heads if heads is None else heads) * sum(self.group_bytes)

    def views(self, slot: memoryview, tokens: int, heads: int) -> Sequence[NDArray[np.uint8]]:
        """The two parts of a slot as arrays [heads, groups, group bytes], in the order of `ROLES`; no copy."""
        groups = tokens // GROUP_TOKENS
        views, start = [], 0
        for size in self.group_bytes:
            stop = start + heads * groups * size
            views.append(np.frombuffer(slot[start:stop], dtype=np.uint8).reshape(heads, groups, size))
            start = stop
        return views
