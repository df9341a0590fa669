"""RMSNorm as transformers computes it for Qwen3: statistics in float32, the gain applied in the model's dtype."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Scales the last dimension to unit mean square, then by the gain.

    Args:
        x: `[..., n]`.
        gain: `[n]`.
        eps: Added to the mean square.

    Returns:
        `[..., n]` in x's dtype.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return gain * (wide * scale).to(x.dtype)
