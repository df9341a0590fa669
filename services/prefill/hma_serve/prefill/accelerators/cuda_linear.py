"""Linear layers on a GPU, one kind per format: each takes an operand (codes and row scales) and gives bfloat16.

Weights are quantised whole, then cut, so that a rank of several multiplies by the same codes as one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from hma_serve import quant
from hma_serve.prefill.accelerators.sharding import Shard
from hma_serve.prefill.kernels.scale_product import scale_product

Rows = tuple[torch.Tensor, torch.Tensor]
"""Codes [tokens, in] and their float32 scales [tokens, 1]."""

CODES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "bf16": torch.bfloat16,
        "fp8_e4m3fn": torch.float8_e4m3fn,
        "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
        "int8": torch.int8,
    }
)
"""Operand formats that GPUs multiply through torch, and the dtype of their codes."""


class GpuLinear(Protocol):
    """A weight on a GPU."""

    def __call__(self, x: Rows, /) -> torch.Tensor:
        """bfloat16 [tokens, out]."""
        ...


def gpu_linear(name: str, parts: Sequence[torch.Tensor], shard: Shard, *, by_input: bool) -> GpuLinear:
    """What multiplies by a weight.

    Args:
        name: Its format, one of `CODES`.
        parts: The matrices [out, in] that are stacked.
        shard: The rank's share.
        by_input: Inputs are cut among the ranks and products summed; otherwise outputs are.
    """
    weight, scale = _quantized(name, parts, shard, by_input=by_input)
    linear: GpuLinear
    if scale is None:
        linear = Bf16Linear(weight)
    elif weight.dtype == torch.int8:
        linear = Int8Linear(weight, scale)
    else:
        linear = Fp8Linear(weight, scale)
    return (lambda x: shard.sum(linear(x))) if by_input and shard.count > 1 else linear


def _quantized(
    name: str, parts: Sequence[torch.Tensor], shard: Shard, *, by_input: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes [out, in] and scales [1, out] of the rank's share."""
    operands = [quant.operand_format(name).quantize_weight(part) for part in parts]
    cut = shard.inputs if by_input else shard.outputs
    codes = torch.cat([cut(part.values).to(CODES[name]) for part in operands]).contiguous()
    if operands[0].scale is None:
        return codes, None
    scales = [part.scale if by_input else shard.outputs(part.scale) for part in operands if part.scale is not None]
    return codes, torch.cat(scales).T.contiguous()


class Bf16Linear:
    """The plain product."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Rows, /) -> torch.Tensor:
        """See `GpuLinear`."""
        return torch.nn.functional.linear(x[0], self._weight)


class Fp8Linear:
    """FP8 codes with row-wise scales, accumulated as fast as the device can, as served FP8 models are."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._weight, self._scale = weight, scale

    def __call__(self, x: Rows, /) -> torch.Tensor:
        """See `GpuLinear`."""
        codes, scales = x
        return torch._scaled_mm(
            codes,
            self._weight.T,
            scale_a=scales,
            scale_b=self._scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


class Int8Linear:
    """INT8 codes with row-wise scales, accumulated exactly."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._weight, self._scale = weight, scale

    def __call__(self, x: Rows, /) -> torch.Tensor:
        """See `GpuLinear`."""
        codes, scales = x
        return scale_product(torch._int_mm(codes, self._weight.T), scales, self._scale)
