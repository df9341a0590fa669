"""What stands between the products of a layer: embedding, residual and norm, qk-norm and rotation and write, SwiGLU.

Two limits, for a row of the 8B: bytes, 22 a channel in `residual_norm` behind four parts (90 KB), 19 in `project` (118
KB), 6 in `gate` (74 KB), 4 in `embed` (16 KB), so at most 1 us at 32 rows and 4.3 TB/s, 2.2 us for `gate` at 128; and
operations, at most 20 a channel, less than a tenth of that. In fact launches and latency bind all four.

Arithmetic is float32 between reads and writes, rounded where the model (`hma_serve.model`) rounds: against float64,
which rounds nowhere, at most 5e-3 (relative L2, asserted over the shapes of Qwen3); the embedding is exact.

What is read of a product may come in parts, [parts, rows, channels] (`skinny`); they are added where they are read.

As PTX a kernel is launched while the one before still runs, and waits for it where it first needs its result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embed(TOKEN, LAST, TABLE, HIDDEN, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of the embedding; a token below 0 is the one that row -1 - token of the step before drew."""
    row = tl.program_id(0)
    token = tl.load(TOKEN + row).to(tl.int64)
    if token < 0:
        token = tl.load(LAST - 1 - token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    tl.store(HIDDEN + row * WIDTH + column, tl.load(TABLE + token * WIDTH + column, mask=inside), mask=inside)


@triton.jit
def _added(PRODUCT, stride, mask, PARTS: tl.constexpr, KIND: tl.constexpr):
    """Elements of a product whose parts stand `stride` apart: float32, rounded to KIND as one part would be."""
    total = tl.load(PRODUCT, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(PRODUCT + part * stride, mask=mask, other=0.0)
    return total.to(KIND).to(tl.float32)


@triton.jit
def residual_norm(
    HIDDEN,
    DELTA,  # a product
    GAIN,
    OUT,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # of DELTA; 0: there is none
    PTX: tl.constexpr,
):
    """HIDDEN += DELTA if there is one, then OUT = GAIN * HIDDEN / rms(HIDDEN); a row a program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(GAIN + column, mask=inside, other=0.0).to(tl.float32)
    if PTX:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(HIDDEN + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        x += _added(DELTA + row * WIDTH + column, tl.num_programs(0) * WIDTH, inside, PARTS, HIDDEN.dtype.element_ty)
        rounded = x.to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + row * WIDTH + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    y = scaled.to(OUT.dtype.element_ty).to(tl.float32) * gain
    tl.store(OUT + row * WIDTH + column, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(x, up, KIND: tl.constexpr):
    """silu(x) * up of float32, each rounded to KIND where a model in that type rounds."""
    x = x.to(KIND).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(KIND).to(tl.float32)
    return (silu * up.to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def gate(UP, OUT, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """silu(first half) * second half of a row of a product of one part; `skinny` does it itself."""
    if PTX:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(UP + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * WIDTH + column, swiglu(x, up, OUT.dtype.element_ty), mask=inside)


@triton.jit
def _normed(low, high, GAIN, channel, eps, D: tl.constexpr, TYPE: tl.constexpr):
    """Both halves of heads [n, D / 2] at unit mean square, times the gain."""
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
    low_gain = tl.load(GAIN + channel).to(tl.float32)[None, :]
    high_gain = tl.load(GAIN + D // 2 + channel).to(tl.float32)[None, :]
    low = ((low * scale).to(TYPE).to(tl.float32) * low_gain).to(TYPE).to(tl.float32)
    high = ((high * scale).to(TYPE).to(tl.float32) * high_gain).to(TYPE).to(tl.float32)
    return low, high


@triton.jit
def _key_place(token, channel, D: tl.constexpr):
    """Where an element of a key page stands; see `fragment_order`."""
    row, column = token % 16, channel % 16
    lane = row % 8 * 4 + column % 8 // 2
    return ((token // 16 * (D // 16) + channel // 16) * 32 + lane) * 8 + column % 2 + row // 8 * 2 + column // 8 * 4


@triton.jit
def _value_place(token, channel, D: tl.constexpr):
    """The same for a value page, whose rows are channels."""
    row, column = channel % 16, token % 16
    lane = row % 8 * 4 + column % 8 // 2
    return ((token // 16 * (D // 16) + channel // 16) * 32 + lane) * 8 + column % 2 + row // 8 * 2 + column // 8 * 4


@triton.jit
def project(
    QKV,  # a product, [parts, rows, heads of q, then of k, then of v, D]
    Q_GAIN,
    K_GAIN,
    COS_SIN,  # fp32 [positions, D]: cosines, then sines
    Q16,  # fp16 [rows, heads, D]
    QBF,  # bf16 [rows, heads, D]
    QSCALE,  # fp32 [rows, heads]
    QOFFSET,  # fp32 [rows, heads]
    K_OFFSET,  # fp32 [KV, D]
    MEMORY,  # bf16 [KV, elements]: one layer of the pool
    KTABLE,  # int32 [slots, table]
    VTABLE,
    SLOT,  # int32 [rows]
    LENGTH,  # int32 [rows]: 0 leaves a row alone
    eps,
    table_stride,
    head_elements,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # a power of two, at least G
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One (row, KV head): its queries and key normed and rotated, key and value written to their plain page.

    Everything is loaded before anything is stored: no load would move ahead of a store that might be to its place, and
    what one program takes is the round trips that it makes one after the other.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    half: tl.constexpr = D // 2
    kind: tl.constexpr = QBF.dtype.element_ty
    if PTX:
        gdc_launch_dependents()
    length = tl.load(LENGTH + row)
    slot = tl.load(SLOT + row).to(tl.int64)
    channel = tl.arange(0, half)
    member = tl.arange(0, HEADS)
    there = (member < G)[:, None]
    all_there = (channel >= 0)[None, :]
    one = tl.arange(0, 1)[:, None] * 0
    qkv = QKV + row * ((G + 2) * KV * D)
    stride = tl.num_programs(0) * ((G + 2) * KV * D)
    at = (head * G + member)[:, None] * D + channel[None, :]
    q_low = _added(qkv + at, stride, there, PARTS, kind)
    q_high = _added(qkv + at + half, stride, there, PARTS, kind)
    key = qkv + (KV * G + head) * D + channel[None, :] + one
    k_low = _added(key, stride, all_there, PARTS, kind)
    k_high = _added(key + half, stride, all_there, PARTS, kind)
    value = qkv + (KV * (G + 1) + head) * D + channel[None, :] + one
    v_low = _added(value, stride, all_there, PARTS, kind)
    v_high = _added(value + half, stride, all_there, PARTS, kind)
    if length > 0:
        position = length - 1
        entry = slot * table_stride + position // 32
        key_at = tl.load(KTABLE + entry).to(tl.int64)
        value_at = tl.load(VTABLE + entry).to(tl.int64)
        cos = tl.load(COS_SIN + position * D + channel)[None, :]
        sin = tl.load(COS_SIN + position * D + half + channel)[None, :]
        if OFFSET:
            c_low = tl.load(K_OFFSET + head * D + channel)[None, :]
            c_high = tl.load(K_OFFSET + head * D + half + channel)[None, :]
        q_low, q_high = _normed(q_low, q_high, Q_GAIN, channel, eps, D, kind)
        k_low, k_high = _normed(k_low, k_high, K_GAIN, channel, eps, D, kind)
        low, high = (q_low * cos - q_high * sin).to(kind), (q_high * cos + q_low * sin).to(kind)
        to = row * (KV * G * D) + at
        tl.store(QBF + to, low, mask=there)
        tl.store(QBF + to + half, high, mask=there)
        low, high = low.to(tl.float32), high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 32)
        raised = ((262 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        tl.store(Q16 + to, (low * raised).to(tl.float16), mask=there)
        tl.store(Q16 + to + half, (high * raised).to(tl.float16), mask=there)
        heads = row * (KV * G) + head * G + member
        tl.store(QSCALE + heads, ((exponent - 8) << 23).to(tl.float32, bitcast=True), mask=member < G)
        if OFFSET:
            tl.store(QOFFSET + heads, tl.sum(low * c_low, 1) + tl.sum(high * c_high, 1), mask=member < G)
        token = position % 32
        memory = MEMORY + head.to(tl.int64) * head_elements
        key_page = memory + key_at * 8
        value_page = memory + value_at * 8
        spot = channel[None, :] + one
        tl.store(key_page + _key_place(token, spot, D), (k_low * cos - k_high * sin).to(kind))
        tl.store(key_page + _key_place(token, spot + half, D), (k_high * cos + k_low * sin).to(kind))
        tl.store(value_page + _value_place(token, spot, D), v_low.to(kind))
        tl.store(value_page + _value_place(token, spot + half, D), v_high.to(kind))
