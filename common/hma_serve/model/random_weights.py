"""Weights that are a function of a seed, a tensor's name and an element's place, and of nothing else.

The same on every device and in every process, so that a prefill worker on one accelerator and a decode worker on
another hold the same model without a file between them. Integer arithmetic that wraps is exact everywhere; torch's own
generators differ between kinds of device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from hma_serve.core.model_config import ModelConfig

_CHUNK = 1 << 24
# Large enough that attention is far from uniform and the likeliest tokens are far from ties.
_GAIN = 1.5
_NORM_SPREAD = 0.2


class RandomSource:
    """A `TensorSource` without files.

    Args:
        shapes: Of the tensors by name.
        config: The dtype in which a checkpoint of this model would store them; values are rounded to it first.
        seed: 32 bits.
        device: Where tensors are made.
        dtype: What they are converted to.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: ModelConfig,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shapes = shapes
        self._stored: torch.dtype = getattr(torch, config.dtype)
        self._seed = seed
        self._device = device
        self._dtype = dtype

    def read(self, name: str) -> torch.Tensor:
        """Makes one tensor: norms about 1, matrices with a standard deviation of 1.5 / sqrt(inputs)."""
        shape = self._shapes[name]
        key = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:4], "little", signed=True)
        made = torch.empty(math.prod(shape), dtype=self._dtype, device=self._device)
        norm = len(shape) == 1
        scale = _NORM_SPREAD if norm else _GAIN * math.sqrt(3 / shape[-1])
        # In pieces, so that no more than the tensor itself is ever needed beside a little.
        for start in range(0, len(made), _CHUNK):
            part = made[start : start + _CHUNK]
            values = _uniform(start, len(part), key, self._device).mul_(scale)
            part.copy_((values.add_(1.0) if norm else values).to(self._stored))
        return made.view(shape)

    def close(self) -> None:
        """Nothing is open."""


def _uniform(start: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """float32 [count] in [-1, 1): an integer hash (lowbias32) of the places from `start`, keyed."""
    mixed = torch.arange(start, start + count, dtype=torch.int32, device=device).bitwise_xor_(key)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        # An arithmetic shift, so the copies of the sign are cut off.
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        mixed.mul_(factor)
    return mixed.float().mul_(2.0**-31)
