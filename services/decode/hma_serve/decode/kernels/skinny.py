"""A matrix times few vectors, at the rate at which the matrix arrives: a matrix library's small products are not.

A program multiplies `_OUTPUTS` rows of the matrix by a slice of its columns. There are as many slices as fill the
multiprocessors once, and whoever reads the product adds what came of them: that costs less than any way of adding it
here. The first columns are asked for, as far as L2, before the kernel in front, which makes the vectors, is over.

Arithmetic: BF16 operands, float32 sums on tensor cores (`wgmma`); parts stay float32 and are rounded once, when they
have been added. So the error is that of one rounding to BF16: at most 3e-3 of the product, relative L2 against float64,
asserted; 1.7e-3 seen. With the gate both halves, the SiLU and the product are rounded as the model does: at most 5e-3,
3.7e-3 seen.

Two limits: two bytes an element of the matrix, and two operations an element and row; at 32 rows the operations take a
tenth of the time of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hma_serve.decode.kernels.elementwise import swiglu
from hma_serve.decode.kernels.launch import nvidia
from hma_serve.decode.kernels.warp import to_l2

MOST_ROWS: Final = 32
"""Columns of its tensor-core product. Fewer rows take as long, more are a matrix library's."""

_OUTPUTS = 64
_DEPTH = 128
"""Rows and columns of the matrix that a program multiplies at a time: 16 KB."""

_RESIDENT: Final = {4: 2, 3: 3}
"""Programs that a multiprocessor's shared memory holds, by how many steps of the loop are under way in each."""

_MOST_PARTS = 8
_AHEAD_BYTES = 2 * _DEPTH
"""Of each of a program's rows that are asked for ahead, a step of the loop: more gets in the way of others."""


@triton.jit
def _places(i, outputs, OUTPUTS: tl.constexpr, GATED: tl.constexpr):
    """Of row i of a program's tile: its channel of the result, and its row of the matrix, the last one behind the end.

    Gated, of every 16 rows eight are of the first half of the matrix and eight are those that these gate: both results
    are then in the same thread.
    """
    channel = tl.program_id(0) * OUTPUTS + i
    if GATED:
        channel = tl.program_id(0) * (OUTPUTS // 2) + i // 16 * 8 + i % 8
    row = tl.minimum(channel, outputs - 1).to(tl.int64)
    if GATED:
        row += i // 8 % 2 * outputs
    return channel, row


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    MATRIX,  # [outputs, WIDTH]; gated, two of them
    X,  # [rows, WIDTH]
    OUT,  # [slices, rows, outputs]
    rows,
    outputs,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,  # columns of a program, a multiple of DEPTH
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # bytes
    GATED: tl.constexpr,
    PTX: tl.constexpr,
):
    channel, output = _places(tl.arange(0, OUTPUTS), outputs, OUTPUTS, GATED)
    begin = tl.program_id(1) * SLICE
    row = tl.arange(0, ROWS)
    column = begin + tl.arange(0, DEPTH)
    matrix = MATRIX + output[:, None] * WIDTH + column[None, :]
    x = X + row[None, :] * WIDTH + column[:, None]
    mine, there = (channel < outputs)[:, None], (row < rows)[None, :]
    if PTX:
        if AHEAD > 0:
            # Half of a row's a thread.
            thread = tl.arange(0, 2 * OUTPUTS)
            _, asked = _places(thread // 2, outputs, OUTPUTS, GATED)
            to_l2(MATRIX + asked * WIDTH + begin + thread % 2 * (AHEAD // 4), AHEAD // 2, thread * 0)
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, tl.minimum(SLICE, WIDTH - begin), DEPTH, num_stages=STAGES):
        weights_there, x_there = mine, there
        if WIDTH % DEPTH != 0:
            weights_there = mine & (start + column < WIDTH)[None, :]
            x_there = there & (start + column < WIDTH)[:, None]
        weights = tl.load(matrix + start, mask=weights_there, other=0.0, eviction_policy="evict_first")
        vectors = tl.load(x + start, mask=x_there, other=0.0)
        if PTX:
            sums = tl.dot(weights, vectors, sums)
        else:
            # The interpreter multiplies BF16 wrongly.
            sums += tl.dot(weights.to(tl.float32), vectors.to(tl.float32), input_precision="ieee")
    kind: tl.constexpr = OUT.dtype.element_ty
    if GATED:
        pairs = tl.permute(tl.reshape(sums, [OUTPUTS // 16, 2, 8, ROWS]), (0, 2, 3, 1))
        first, second = tl.split(pairs)
        found = tl.reshape(swiglu(first, second, kind), [OUTPUTS // 2, ROWS])
        channel = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        tl.store(OUT + row[None, :] * outputs + channel[:, None], found, mask=(channel < outputs)[:, None] & there)
    else:
        to = OUT + (tl.program_id(1) * rows + row[None, :]) * outputs + channel[:, None]
        tl.store(to, sums.to(kind), mask=mine & there)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a product is shared among programs.

    Attributes:
        slices: Of the columns.
        width: Columns of each but the last, which may have fewer.
        stages: Of the loop.
    """

    slices: int
    width: int
    stages: int


@cache
def _cut(outputs: int, width: int, processors: int, most: int) -> _Cut:
    """The fullest single wave of programs, of as few slices as that takes; if one slice needs more, that."""
    tiles, steps = -(-outputs // _OUTPUTS), -(-width // _DEPTH)

    def fill(stages: int, slices: int) -> float:
        longest = -(-steps // slices)
        return tiles * steps / (_RESIDENT[stages] * processors * longest)

    fitting = [
        (stages, slices)
        for slices in range(1, min(most, steps) + 1)
        for stages, resident in _RESIDENT.items()
        if tiles * slices <= resident * processors
    ]
    stages, slices = max(fitting, key=lambda cut: fill(*cut), default=(min(_RESIDENT), 1))
    depth = -(-steps // slices)
    return _Cut(-(-steps // depth), depth * _DEPTH, stages)


def skinny(
    x: torch.Tensor, matrix: torch.Tensor, *, ptx: bool, whole: bool = False, gated: bool = False
) -> torch.Tensor:
    """X [rows, inputs] times matrix [outputs, inputs], transposed, in parts that are to be added.

    Args:
        x: bfloat16, at most `MOST_ROWS` rows.
        matrix: bfloat16, contiguous.
        ptx: False runs the twin in plain Triton, in float32: for the interpreter.
        whole: In one part.
        gated: In one part, silu(first half of the outputs) * second half (SwiGLU).

    Returns:
        [parts, rows, outputs]: float32, or, if it is one part, the dtype of X. Gated: [1, rows, outputs / 2].

    Raises:
        ValueError: There are more rows than that.
    """
    (rows, width), outputs = x.shape, len(matrix)
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} rows are more than {MOST_ROWS}")
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut = _cut(outputs, width, processors, 1 if whole or gated else _MOST_PARTS)
    channels = outputs // 2 if gated else outputs
    out = x.new_empty((cut.slices, rows, channels), dtype=torch.float32 if cut.slices > 1 else x.dtype)
    last = width - (cut.slices - 1) * cut.width
    _skinny[(triton.cdiv(outputs, _OUTPUTS), cut.slices)](
        matrix,
        x,
        out,
        rows,
        channels,
        WIDTH=width,
        SLICE=cut.width,
        OUTPUTS=_OUTPUTS,
        DEPTH=_DEPTH,
        ROWS=MOST_ROWS,
        STAGES=cut.stages,
        AHEAD=min(_AHEAD_BYTES, 2 * last) // 32 * 32 if width % 8 == 0 else 0,
        GATED=gated,
        PTX=ptx,
        num_warps=4,
        **nvidia(ptx),
    )
    return out
