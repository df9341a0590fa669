"""`f32` and `bf16`: the tensor's own bytes, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec

if TYPE_CHECKING:
    from torch import Tensor


class Plain(TorchCodec):
    """Elements of one dtype without scales."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    def group_bytes(self, head_dim: int) -> int:
        """32 rows of the dtype's size."""
        return GROUP_TOKENS * head_dim * self._dtype.itemsize

    def _encode(self, x: Tensor, rounding: Rounding) -> Tensor:
        if rounding != "nearest_even":
            raise ValueError(f"{self.name} rounds to nearest even only")
        return x.to(self._dtype).contiguous().view(torch.uint8).view(x.shape[0], self.group_bytes(x.shape[2]))

    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        row_bytes, rest = divmod(packed.shape[1], GROUP_TOKENS)
        if rest or row_bytes % self._dtype.itemsize:
            raise ValueError(f"{self.name} has no units of {packed.shape[1]} bytes")
        if packed.storage_offset() % self._dtype.itemsize:
            packed = packed.clone()
        return packed.view(self._dtype).reshape(-1, row_bytes // self._dtype.itemsize).to(dtype)
