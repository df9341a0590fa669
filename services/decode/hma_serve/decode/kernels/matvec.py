"""A matrix times one vector, at the rate at which the matrix arrives: a matrix library's smallest product is not.

Arithmetic: float32 products and sums of BF16, rounded once: at most 3e-3 of the product, relative L2 against float64,
asserted. Two limits: two bytes an element of the matrix, and two float32 operations, where an H200 does 28 while they
arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hma_serve.decode.kernels.launch import nvidia

_ELEMENTS = 8192
"""Of the matrix that a program has under way: 16 KB."""
_PROGRAMS = 768
"""At least, if there are as many rows: about six on each multiprocessor."""


@triton.jit
def _matvec(MATRIX, X, OUT, outputs, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    matrix = MATRIX + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    there = (row < outputs)[:, None]
    # The matrix does not change, so its first part may come before the vector is there.
    ahead = tl.load(matrix, mask=there & (column < WIDTH)[None, :], other=0.0, eviction_policy="evict_first")
    if PTX:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        held = ahead
        after = start + BLOCK + column
        ahead = tl.load(
            matrix + start + BLOCK, mask=there & (after < WIDTH)[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(X + start + column, mask=start + column < WIDTH, other=0.0).to(tl.float32)
        sums += held.to(tl.float32) * x[None, :]
    tl.store(OUT + row, tl.sum(sums, 1).to(OUT.dtype.element_ty), mask=row < outputs)


def matvec(x: torch.Tensor, matrix: torch.Tensor, *, ptx: bool) -> torch.Tensor:
    """X [1, inputs] times matrix [outputs, inputs], transposed: [1, outputs]; sums in float32.

    Args:
        x: bfloat16.
        matrix: bfloat16, contiguous.
        ptx: Launch while the kernel before still runs; False: plain Triton.
    """
    outputs, width = matrix.shape
    out = x.new_empty((1, outputs))
    rows = min(16, max(2, triton.next_power_of_2(outputs // _PROGRAMS + 1) // 2))
    block = min(_ELEMENTS // rows, triton.next_power_of_2(width))
    _matvec[(triton.cdiv(outputs, rows),)](
        matrix, x, out, outputs, WIDTH=width, ROWS=rows, BLOCK=block, PTX=ptx, num_warps=4, **nvidia(ptx)
    )
    return out
