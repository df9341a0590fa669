"""K offsets on tensors: taken from keys before packing, given back to scores; and attention that says what is meant.

A reader never adds c to decoded keys: it adds q.c to the scores of the keys that were offset, one number per query and
head instead of one vector per key. `hma_serve.kvblock.OffsetTable` says where c comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def subtract_offset(keys: Tensor, offset: Tensor) -> Tensor:
    """Keys as they are packed.

    Args:
        keys: [..., kv heads, tokens, head_dim].
        offset: c, float32 [kv heads, head_dim].

    Returns:
        float32, the shape of `keys`: in higher precision than bfloat16 keys, so that nothing is rounded twice.
    """
    return keys.float() - offset.unsqueeze(-2)


def offset_scores(q: Tensor, offset: Tensor) -> Tensor:
    """What is added to the scores of offset keys.

    Args:
        q: Queries as they meet the keys, scaled or not, [..., heads, tokens, head_dim].
        offset: c, [kv heads, head_dim]; heads are a multiple of these, neighbours share one.

    Returns:
        q.c, [..., heads, tokens, 1], to be broadcast over keys.
    """
    shared = offset.to(q.dtype).repeat_interleave(q.shape[-3] // offset.shape[0], dim=0)
    return q @ shared.unsqueeze(-1)


def reference_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, offset: Tensor | None = None, offset_tokens: int = 0
) -> Tensor:
    """Softmax attention of every query to every key, in the queries' dtype: what faster code is compared with.

    Args:
        q: [heads, queries, head_dim], unscaled.
        keys: [kv heads, tokens, head_dim]; the first `offset_tokens` have had `offset` taken away.
        values: [kv heads, tokens, value dim].
        offset: c, [kv heads, head_dim]; None: no key is offset.
        offset_tokens: Keys that are.

    Returns:
        [heads, queries, value dim].
    """
    group = q.shape[0] // keys.shape[0]
    q = q * q.shape[-1] ** -0.5
    scores = q @ keys.to(q.dtype).repeat_interleave(group, dim=0).transpose(1, 2)
    if offset is not None:
        scores[..., :offset_tokens] += offset_scores(q, offset)
    return torch.softmax(scores, dim=-1) @ values.to(q.dtype).repeat_interleave(group, dim=0)
