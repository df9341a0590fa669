"""Causal attention of a chunk over keys and values as the codec stores them, the chunk's own included.

Prefill must give the same bytes whatever the chunk size, or a retry, a prefix hit or another schedule would change a
greedy answer. Three things see to it. What is attended to is what was stored, so a token sees its neighbours alike
whether they arrived with it or before it. Queries go in fixed groups of 32, and each group is multiplied with exactly
the keys up to its own end, so every product has the same shape for every chunking (matrix kernels sum in another order
for another shape). And keys lie token-major, so a group's operands have the same strides too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.v1.kv_block_pb2 import KV_ROLE_K, KV_ROLE_V


class PackedKv(Protocol):
    """Where a request's packed KV is written, and read back decoded."""

    def append(self, layer: int, role: int, start: int, values: torch.Tensor) -> None:
        """Packs values [tokens, heads, D] of the tokens from `start` on."""
        ...

    def read(self, layer: int, role: int, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens as stored, decoded to the queries' dtype: [tokens, heads, D], contiguous."""
        ...


class StoredAttention:
    """The attention of one batch: packs each segment's new K and V, then attends to what is stored.

    Args:
        segments: Start position, token count and packed KV of each, in the order of the rows.
        k_offsets: What keys lose before they are packed, float32 [layers, kv heads, D]; None: nothing. Every key that
            is attended to has lost it, so the scores of a query all fall by the same number and need none back.
    """

    def __init__(self, segments: Sequence[tuple[int, int, PackedKv]], k_offsets: torch.Tensor | None = None) -> None:
        self._segments = segments
        self._k_offsets = k_offsets

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        """See `hma_serve.model.Attention`."""
        out = torch.empty_like(q)
        row = 0
        if self._k_offsets is not None:
            k = k.float() - self._k_offsets[layer]
        for start, tokens, kv in self._segments:
            rows = slice(row, row + tokens)
            kv.append(layer, KV_ROLE_K, start, k[rows])
            kv.append(layer, KV_ROLE_V, start, v[rows])
            keys = kv.read(layer, KV_ROLE_K, start + tokens)
            values = kv.read(layer, KV_ROLE_V, start + tokens)
            attend_groups(q[rows], keys, values, start, out[rows])
            row += tokens
        return out


def attend_groups(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Causal attention in groups of 32 queries, each over exactly the keys up to its end.

    Args:
        q: Queries [T, heads, D] at positions start, start + 1, ...; T is a multiple of 32.
        keys: [start + T, kv heads, D], contiguous.
        values: As keys.
        start: A multiple of 32.
        out: [T, heads, D], written.
    """
    for row in range(0, q.shape[0], GROUP_TOKENS):
        rows, end = slice(row, row + GROUP_TOKENS), start + row + GROUP_TOKENS
        visible = torch.ones(GROUP_TOKENS, end, dtype=torch.bool, device=q.device).tril(end - GROUP_TOKENS)
        group = functional.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            keys[:end].transpose(0, 1)[None],
            values[:end].transpose(0, 1)[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        out[rows] = group[0].transpose(0, 1)
