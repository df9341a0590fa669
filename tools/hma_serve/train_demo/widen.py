"""Starts a model with heads of twice the size from a trained one, so that nothing it has learned is lost.

The doubled rotary base exponent keeps the old frequencies for the first half of the pairs: `(theta^2)^(-i/2n)` is
`theta^(-i/n)`. The new pairs turn so slowly that over the whole context they carry no position, only content, which is
what finding a token thousands of positions back needs. They start without effect: new query rows and new columns of the
output projection are zero, and gains make up for the longer vectors' norm and the attention's smaller scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import open_weights

_NEW_KEYS = 0.05
_NEW_VALUES = 0.03


def initial_weights(directory: Path, config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint's weights in float32, widened where its heads have half the size.

    Raises:
        InvalidArgument: The checkpoint's model is neither `config` nor the one that widens to it.
    """
    stored = read_model_config(directory)
    weights = dict(open_weights(directory, stored, dtype=torch.float32))
    if stored == config:
        return weights
    if widened_config(stored) == config:
        return widened(weights, stored, seed)
    raise InvalidArgument(f"training cannot go on from {directory}: it holds another architecture", field="init")


def widened_config(config: ModelConfig) -> ModelConfig:
    """The configuration with heads of twice the size and the same rotary frequencies in their first half."""
    return replace(config, head_dim=2 * config.head_dim, rope_theta=config.rope_theta**2)


def widened(weights: Mapping[str, torch.Tensor], config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights for `widened_config(config)` that compute what `weights` compute, new keys aside, within rounding."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _widened(name, tensor, config.head_dim, generator) for name, tensor in weights.items()}


def _widened(name: str, tensor: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("q_norm", "k_norm"):
        return _spread(tensor * 2**-0.25, size, tensor.mean() * 2**-0.25)
    if kind == "q_proj":
        return _rows(tensor, size, torch.zeros_like(tensor))
    if kind == "k_proj":
        return _rows(tensor, size, _NEW_KEYS * tensor.std() * torch.randn(tensor.shape, generator=generator))
    if kind == "v_proj":
        return _rows(tensor, size, _NEW_VALUES * torch.randn(tensor.shape, generator=generator))
    if kind == "o_proj":
        return _rows(tensor.mT, size, torch.zeros_like(tensor.mT)).mT.contiguous()
    return tensor


def _rows(old: torch.Tensor, size: int, new: torch.Tensor) -> torch.Tensor:
    """Joins old and new rows `[heads * size, width]` within every head."""
    heads, width = len(old) // size, old.shape[1]
    return _spread(old.view(heads, size, width), size, new.view(heads, size, width)).reshape(2 * len(old), width)


def _spread(old: torch.Tensor, size: int, new: torch.Tensor) -> torch.Tensor:
    """Puts the old halves of rotary pairs first in each half of the longer head."""
    dim = old.dim() - 2 if old.dim() > 1 else 0
    first, second = old.chunk(2, dim)
    new_first, new_second = new.expand(old.shape).chunk(2, dim)
    return torch.cat((first, new_first, second, new_second), dim)
