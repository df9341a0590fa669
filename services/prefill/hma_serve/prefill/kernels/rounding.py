"""Rounding inside kernels, the same on a device and in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 has no fraction bits left there
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_even(x):
    """The nearest whole number, ties to even, of float32 below 2^22."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def round_bf16(x):
    """Float32 rounded to bfloat16, ties to even, as float32; the interpreter's own conversion truncates."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x
