"""From stacked projections to attention's operands in one pass: QK norm, rotation, and K and V in native bytes.

One program takes 32 tokens of a few heads, one after the other; a head's 32 tokens are one unit of the wire format. It
writes queries as they are, keys and values packed, and beside them the values that a reader of the packed bytes
decodes, because attention must see what was stored. Byte layouts are the format's (docs/kv-block-format.md);
`hma_serve.quant` is the reference, bit for bit.

The limit is bytes: 4 a value in and out for queries, 5 for keys and values under eight-bit codecs. A program of one
head would read as many bytes of the rotation table as of the head, so the heads of a program share it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hma_serve.prefill.kernels.rounding import round_bf16, round_even

GROUP = 32
CODECS = {"bf16": 0, "fp8_e4m3fn": 1, "int8": 2, "tt_bfp8_b": 3}
"""What the kernel packs; other codecs are packed by `hma_serve.quant`."""

_BF16 = tl.constexpr(0)
_INT8 = tl.constexpr(2)
_BFP8 = tl.constexpr(3)
_UNPACKED = tl.constexpr(4)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)
_LARGEST_SUBNORMAL = tl.constexpr(2.0**-126 - 2.0**-149)
_TILE_BYTES = tl.constexpr(1088)
_HEADS_EACH = (4, 2, 1)


@triton.jit
def _pack_rows(low, high, unit, D: tl.constexpr, CODEC: tl.constexpr):
    """Codes row-major, then a float32 scale per token; returns the decoded halves."""
    rows = tl.arange(0, 32)
    half: tl.constexpr = D // 2
    place = rows[:, None] * D + tl.arange(0, half)[None, :]
    LARGEST: tl.constexpr = 127.0 if CODEC == _INT8 else 448.0
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = tl.maximum(tl.math.div_rn(largest, LARGEST), _SMALLEST_SCALE)
    low = tl.minimum(tl.maximum(tl.math.div_rn(low, scale[:, None]), -LARGEST), LARGEST)
    high = tl.minimum(tl.maximum(tl.math.div_rn(high, scale[:, None]), -LARGEST), LARGEST)
    if CODEC == _INT8:
        low_codes, high_codes = round_even(low).to(tl.int8), round_even(high).to(tl.int8)
        codes = unit.to(tl.pointer_type(tl.int8))
    else:
        low_codes, high_codes = low.to(tl.float8e4nv), high.to(tl.float8e4nv)
        codes = unit.to(tl.pointer_type(tl.float8e4nv))
    tl.store(codes + place, low_codes)
    tl.store(codes + place + half, high_codes)
    tl.store((unit + 32 * D).to(tl.pointer_type(tl.float32)) + rows, scale)
    return low_codes.to(tl.float32) * scale[:, None], high_codes.to(tl.float32) * scale[:, None]


@triton.jit
def _pack_tiles(values, unit, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Tenstorrent tiles of channels FIRST to FIRST + COLUMNS; returns the decoded values."""
    groups: tl.constexpr = COLUMNS // 16
    x = tl.reshape(values, (32, groups, 16))
    x = tl.where(tl.abs(x) <= _LARGEST_SUBNORMAL, 0.0, x)
    exponent = tl.max(tl.abs(x), 2).to(tl.int32, bitcast=True) >> 23
    scale = ((255 - tl.maximum(exponent, 1)) << 23).to(tl.float32, bitcast=True)  # 2^(128 - E)
    whole = round_even(x * scale[:, :, None] * 32.0)
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    magnitude = tl.abs(whole).to(tl.int32)
    codes = magnitude | tl.where(whole < 0, 128, 0)
    rows = tl.arange(0, 32)[:, None]
    channels = FIRST + tl.arange(0, groups)[None, :] * 16
    tile = channels // 32 * _TILE_BYTES
    face = rows // 16 * 2 + channels % 32 // 16
    tl.store(unit + tile + face * 16 + rows % 16, exponent.to(tl.uint8))
    elements = tile + 64 + face * 256 + rows % 16 * 16
    tl.store(unit + elements[:, :, None] + tl.arange(0, 16)[None, None, :], codes.to(tl.uint8))
    step = (tl.maximum(exponent - 6, 0) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(whole * step[:, :, None], (32, COLUMNS))


@triton.jit
def _store(low, high, unit, decoded, stride, D: tl.constexpr, CODEC: tl.constexpr):
    """Packs a unit and writes its decoded values at rows of `stride` elements."""
    half: tl.constexpr = D // 2
    rows, columns = tl.arange(0, 32)[:, None], tl.arange(0, half)[None, :]
    if CODEC == _BF16:
        low, high = round_bf16(low), round_bf16(high)
        plain = unit.to(tl.pointer_type(tl.bfloat16)) + rows * D + columns
        tl.store(plain, low.to(tl.bfloat16))
        tl.store(plain + half, high.to(tl.bfloat16))
    elif CODEC == _BFP8:
        low = _pack_tiles(low, unit, 0, half)
        high = _pack_tiles(high, unit, half, half)
    elif CODEC != _UNPACKED:
        low, high = _pack_rows(low, high, unit, D, CODEC)
    tl.store(decoded + rows * stride + columns, round_bf16(low).to(tl.bfloat16))
    tl.store(decoded + rows * stride + columns + half, round_bf16(high).to(tl.bfloat16))


@triton.jit
def _turned(low, high, low_gain, high_gain, cos, sin, eps, D: tl.constexpr):
    """One head's norm and rotation."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    scale = tl.math.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
    low = round_bf16(round_bf16(low * scale) * low_gain)
    high = round_bf16(round_bf16(high * scale) * high_gain)
    return round_bf16(low * cos - high * sin), round_bf16(high * cos + low * sin)


@triton.jit
def _kernel(
    qkv, cos_sin, q_gain, k_gain, k_offset, q_out,
    k_packed, v_packed, k_decoded, v_decoded,
    head_units, k_unit_bytes, v_unit_bytes, first_group, first_row, first_position, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr,
    K_CODEC: tl.constexpr, V_CODEC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    group, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * EACH
    half: tl.constexpr = D // 2
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    own = group * 32 + tl.arange(0, 32)[:, None]
    rows, columns = first_row + own, tl.arange(0, half)[None, :]
    source = qkv + rows * width + first * D + columns
    stored = (first_group + group) * 32
    low, high = tl.load(source), tl.load(source + half)
    if first < HEADS + KV_HEADS:
        gain = q_gain
        if first >= HEADS:
            gain = k_gain
        low_gain, high_gain = tl.load(gain + columns).to(tl.float32), tl.load(gain + half + columns).to(tl.float32)
        angle = cos_sin + (first_position + own) * D + columns
        cos, sin = tl.load(angle), tl.load(angle + half)
        for step in tl.static_range(EACH):
            turned_low, turned_high = low, high
            if step + 1 < EACH:  # the next head is on its way while this one is worked on
                low, high = tl.load(source + (step + 1) * D), tl.load(source + (step + 1) * D + half)
            turned_low, turned_high = _turned(turned_low, turned_high, low_gain, high_gain, cos, sin, eps, D)
            if first < HEADS:
                target = q_out + (rows * HEADS + first + step) * D + columns
                tl.store(target, turned_low.to(tl.bfloat16))
                tl.store(target + half, turned_high.to(tl.bfloat16))
            else:
                head = first + step - HEADS
                if OFFSET:
                    turned_low -= tl.load(k_offset + head * D + columns)
                    turned_high -= tl.load(k_offset + head * D + half + columns)
                unit = k_packed + (head * head_units + first_group + group) * k_unit_bytes
                place = k_decoded + (stored * KV_HEADS + head) * D
                _store(turned_low, turned_high, unit, place, KV_HEADS * D, D, K_CODEC)
    else:
        for step in tl.static_range(EACH):
            this_low, this_high = low.to(tl.float32), high.to(tl.float32)
            if step + 1 < EACH:
                low, high = tl.load(source + (step + 1) * D), tl.load(source + (step + 1) * D + half)
            head = first + step - HEADS - KV_HEADS
            unit = v_packed + (head * head_units + first_group + group) * v_unit_bytes
            _store(this_low, this_high, unit, v_decoded + (stored * KV_HEADS + head) * D, KV_HEADS * D, D, V_CODEC)


def store_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    gains: tuple[Tensor, Tensor],
    eps: float,
    *,
    q: Tensor,
    packed: tuple[Tensor, Tensor] | None,
    decoded: tuple[Tensor, Tensor],
    codecs: tuple[str, str],
    k_offset: Tensor | None = None,
    row: int,
    tokens: int,
    start: int,
) -> None:
    """Norms, rotates and stores one segment of a batch.

    Args:
        qkv: bfloat16 [batch tokens, (heads + 2 kv heads) * D], contiguous.
        cos_sin: float32 [positions, D], as `hma_serve.model.rotary_table` makes it.
        gains: bfloat16 [D] for queries and for keys.
        eps: Of the norms.
        q: Written: bfloat16 [batch tokens, heads, D].
        packed: Written: the layer's keys and values, uint8 [kv heads, groups, group bytes], contiguous; None: they
            are left as they are.
        decoded: Written: bfloat16 [prompt tokens, kv heads, D], contiguous; of unpacked ones [tokens, kv heads, D].
        codecs: Of keys and values, each one of `CODECS` if they are packed.
        k_offset: float32 [kv heads, D], subtracted from keys before they are stored; None: nothing.
        row: The segment's first row in the batch.
        tokens: Its tokens, a multiple of 32.
        start: Its first token's position in the prompt, a multiple of 32.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = (qkv.shape[1] // head_dim - heads) // 2
    first_group, units, numbers = 0, decoded, [_UNPACKED.value] * 2
    if packed is not None:
        first_group, units, numbers = start // GROUP, packed, [CODECS[name] for name in codecs]
    each = next(count for count in _HEADS_EACH if heads % count == kv_heads % count == 0)
    _kernel[(tokens // GROUP, (heads + 2 * kv_heads) // each)](
        qkv, cos_sin, *gains, gains[1] if k_offset is None else k_offset, q, *units, *decoded,
        units[0].shape[1], units[0].shape[2], units[1].shape[2], first_group, row, start, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, EACH=each, K_CODEC=numbers[0], V_CODEC=numbers[1],
        OFFSET=k_offset is not None,
        num_warps=8,
    )  # fmt: skip
