"""The epilogue of an int8 product: int32 sums times both rows of scales, rounded once to bfloat16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hma_serve.prefill.kernels.rounding import round_bf16


@triton.jit
def _kernel(sums, row_scales, column_scales, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    product = tl.load(sums + row * columns + column, mask=mask, other=0).to(tl.float32)
    product = product * tl.load(row_scales + row) * tl.load(column_scales + column, mask=mask, other=0.0)
    tl.store(out + row * columns + column, round_bf16(product).to(tl.bfloat16), mask=mask)


def scale_product(sums: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """bfloat16 [rows, columns] of int32 [rows, columns], float32 [rows, 1] and float32 [1, columns]; all contiguous."""
    out = torch.empty(sums.shape, dtype=torch.bfloat16, device=sums.device)
    block = 2048
    grid = (len(sums), triton.cdiv(sums.shape[1], block))
    _kernel[grid](sums, row_scales, column_scales, out, sums.shape[1], BLOCK=block, num_warps=4)
    return out
