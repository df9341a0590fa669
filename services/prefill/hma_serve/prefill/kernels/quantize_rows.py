"""What enters a matrix product, made where it is computed: RMSNorm, SwiGLU or nothing, then codes and row scales.

A pass of its own over the activations costs as much as eight-bit products save, so each kernel reads its input once and
writes codes. A row lies in registers between the two. Intermediate roundings are those of the reference
(`hma_serve.model`): what it rounds to bfloat16 is rounded here. With a bfloat16 output there are no scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hma_serve.prefill.kernels.rounding import round_bf16, round_even

# What a pass writes: values as they are; codes and scales; scales alone; codes under scales that are there.
WHOLE, CODES, SCALES, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # odd: codes
SMALLEST_SCALE = tl.constexpr(2.0**-126)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.int8: 127.0}
"""By dtype of the codes, the largest magnitude."""


@triton.jit
def _store_row(y, columns, mask, row, width, codes, scales, MODE: tl.constexpr, LARGEST: tl.constexpr):
    """Writes a row of float32 values as the mode says."""
    kind: tl.constexpr = codes.dtype.element_ty
    if MODE == GIVEN:
        scale = tl.load(scales + row)
    elif MODE != WHOLE:
        largest = tl.max(tl.where(mask, tl.abs(y), 0.0), 0)
        scale = tl.maximum(tl.math.div_rn(largest, LARGEST), SMALLEST_SCALE)
        tl.store(scales + row, scale)
    if MODE % 2 == 1:  # codes and their scales, or codes under given ones
        y = tl.math.div_rn(y, scale)
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        if kind == tl.int8:
            y = round_even(y)
    if MODE != SCALES:
        tl.store(codes + row * width + columns, y.to(kind), mask=mask)


@triton.jit
def _norm_kernel(
    hidden,
    delta,
    gain,
    codes,
    scales,
    width,
    eps,
    ADD: tl.constexpr,
    MODE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(hidden + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x = round_bf16(x + tl.load(delta + row * width + columns, mask=mask, other=0.0).to(tl.float32))
        tl.store(hidden + row * width + columns, x.to(tl.bfloat16), mask=mask)
    scale = tl.math.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = round_bf16(round_bf16(x * scale) * tl.load(gain + columns, mask=mask, other=0.0).to(tl.float32))
    _store_row(y, columns, mask, row, width, codes, scales, MODE, LARGEST)


@triton.jit
def _swiglu_kernel(gate_up, codes, scales, width, MODE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    y = round_bf16(round_bf16(gate / (1.0 + tl.exp(-gate))) * up)
    _store_row(y, columns, mask, row, width, codes, scales, MODE, LARGEST)


@triton.jit
def _plain_kernel(x, codes, scales, width, MODE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    y = tl.load(x + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(y, columns, mask, row, width, codes, scales, MODE, LARGEST)


Share = Callable[[Tensor], Tensor]
"""Element-wise maximum over ranks that hold parts of the same rows."""


def normed_rows(
    hidden: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, *, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the residual stream as an operand.

    Args:
        hidden: bfloat16 [tokens, hidden], contiguous; `delta` is added to it in place.
        gain: bfloat16 [hidden].
        eps: Added to the mean square.
        dtype: Of the codes: FP8 or int8; bfloat16 leaves the values whole.
        delta: bfloat16, as `hidden`: added before the norm.

    Returns:
        Codes [tokens, hidden] and scales float32 [tokens, 1] (unset for bfloat16).
    """

    def run(codes: Tensor, scales: Tensor, **how: int | float) -> None:
        _norm_kernel[(len(hidden),)](
            hidden, hidden if delta is None else delta, gain, codes, scales, hidden.shape[1], eps,
            ADD=delta is not None, **how,
        )  # fmt: skip

    return _rows(hidden, hidden.shape[1], dtype, run)


def swiglu_rows(gate_up: Tensor, dtype: torch.dtype, *, share: Share | None = None) -> tuple[Tensor, Tensor]:
    """silu(gate) * up as an operand.

    Args:
        gate_up: bfloat16 [tokens, 2 * intermediate], contiguous.
        dtype: As of `normed_rows`.
        share: Finds the scale of rows of which this rank holds a part; None: it holds them whole.

    Returns:
        As `normed_rows`, [tokens, intermediate].
    """
    width = gate_up.shape[1] // 2

    def run(codes: Tensor, scales: Tensor, **how: int | float) -> None:
        _swiglu_kernel[(len(gate_up),)](gate_up, codes, scales, width, **how)

    return _rows(gate_up, width, dtype, run, share)


def plain_rows(x: Tensor, dtype: torch.dtype, *, share: Share | None = None) -> tuple[Tensor, Tensor]:
    """A contiguous bfloat16 [tokens, features] as an operand; see `swiglu_rows`."""

    def run(codes: Tensor, scales: Tensor, **how: int | float) -> None:
        _plain_kernel[(len(x),)](x, codes, scales, x.shape[1], **how)

    return _rows(x, x.shape[1], dtype, run, share)


def _rows(
    x: Tensor, width: int, dtype: torch.dtype, run: Callable[..., None], share: Share | None = None
) -> tuple[Tensor, Tensor]:
    codes = torch.empty((len(x), width), dtype=dtype, device=x.device)
    scales = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    how = {"LARGEST": LARGEST.get(dtype, 0.0), "BLOCK": block, "num_warps": max(1, min(16, block // 1024))}
    if dtype == torch.bfloat16:
        run(codes, scales, MODE=WHOLE.value, **how)
    elif share is None:
        run(codes, scales, MODE=CODES.value, **how)
    else:
        run(codes, scales, MODE=SCALES.value, **how)
        scales = share(scales)
        run(codes, scales, MODE=GIVEN.value, **how)
    return codes, scales
