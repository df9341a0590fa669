"""Rotary positions as Qwen3 uses them: each head's halves are rotated against one another.

The table is computed in float32 by the same expression as transformers' (`Qwen3RotaryEmbedding`), because positions in
the tens of thousands amplify any other rounding of the frequencies. The rotation itself is done in float32 and rounded
once.
"""

from __future__ import annotations

import torch


def rotary_table(head_dim: int, theta: float, positions: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines for every position.

    Args:
        head_dim: Elements per head, even.
        theta: Base of the frequencies.
        positions: Number of positions, from 0.
        device: Where the table lives.

    Returns:
        float32 `[positions, head_dim]`: cosines in the first half of the columns, sines in the second.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Applies the rotation to every head.

    Args:
        x: `[T, heads, head_dim]`.
        cos_sin: `[T, head_dim]`, the table's rows at the tokens' positions.

    Returns:
        `[T, heads, head_dim]` in x's dtype.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
