"""What a codec is on tensors: pack whole groups of 32 tokens into opaque units, and read units back.

The layout is the format's (docs/kv-block-format.md); `hma_serve.kvblock` holds the normative decoder, and
tests hold the two to the same bits. Here everything is vectorised, stays on the tensor's device and never
synchronises with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP_TOKENS: Final = 32
"""Tokens of one unit."""

Rounding: TypeAlias = Literal["nearest_even", "nearest_away", "truncate"]
"""What an encoder does with a value half-way between two codes, or with all between them."""

_FLOATS: Final = (torch.float32, torch.bfloat16)


class TorchCodec(ABC):
    """One codec on tensors.

    Attributes:
        name: As in `hma_serve.kvblock`.
    """

    name: str

    def __repr__(self) -> str:
        return f"<torch codec {self.name}>"

    @abstractmethod
    def group_bytes(self, head_dim: int) -> int:
        """Bytes of one head and one group of 32 tokens."""

    @abstractmethod
    def _encode(self, x: Tensor, rounding: Rounding) -> Tensor:
        """Pack [units, 32, head_dim] into uint8 [units, group_bytes]."""

    @abstractmethod
    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Read uint8 [units, group_bytes] into [units * 32, head_dim]."""

    def encode(self, x: Tensor, rounding: Rounding = "nearest_even") -> Tensor:
        """Pack K or V.

        Args:
            x: float32 or bfloat16 [..., tokens, head_dim], tokens a multiple of 32, any device. Must be finite:
                other values are not reported (that would wait for the device) but become codes that readers refuse.
            rounding: One that the codec knows.

        Returns:
            uint8 [..., tokens / 32, group_bytes].

        Raises:
            ValueError: Wrong dtype, tokens, head_dim or rounding.
        """
        return self._shaped(x, self._encode(self._units(x), rounding))

    def _units(self, x: Tensor) -> Tensor:
        """Check what is to be packed and view it as [units, 32, head_dim]."""
        *lead, tokens, head_dim = x.shape
        if x.dtype not in _FLOATS:
            raise ValueError(f"{self.name} packs float32 or bfloat16, not {x.dtype}")
        if tokens % GROUP_TOKENS:
            raise ValueError(f"{tokens} tokens are not whole groups of {GROUP_TOKENS}")
        return x.reshape(math.prod(lead) * (tokens // GROUP_TOKENS), GROUP_TOKENS, head_dim)

    def _shaped(self, x: Tensor, packed: Tensor) -> Tensor:
        """Packed units in the shape that `encode` promises for `x`."""
        *lead, tokens, head_dim = x.shape
        return packed.view(*lead, tokens // GROUP_TOKENS, self.group_bytes(head_dim))

    def decode(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read packed K or V.

        Args:
            packed: uint8 [..., groups, group_bytes], any device. head_dim follows from group_bytes.
            dtype: float32 or bfloat16.

        Returns:
            [..., groups * 32, head_dim]; possibly a view of `packed`, so do not write to it.

        Raises:
            ValueError: Wrong dtype, or no head_dim has such units.
        """
        *lead, groups, unit_bytes = packed.shape
        if packed.dtype != torch.uint8 or dtype not in _FLOATS:
            raise ValueError(f"{self.name} reads uint8 into float32 or bfloat16, not {packed.dtype} into {dtype}")
        values = self._decode(packed.reshape(math.prod(lead) * groups, unit_bytes), dtype)
        return values.view(*lead, groups * GROUP_TOKENS, values.shape[-1])
