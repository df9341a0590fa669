"""Causal attention of a chunk over its prompt's keys and values so far, through torch's fused kernels on a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attends the last tokens of a prompt to all of it.

    Args:
        q: [T, heads, D], the last T of S tokens.
        keys: [S, kv heads, D].
        values: As keys.

    Returns:
        [T, heads, D].
    """
    whole = len(q) == len(keys)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=None if whole else causal_lower_right(len(q), len(keys)),
        is_causal=whole,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
