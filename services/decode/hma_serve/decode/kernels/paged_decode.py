"""Grouped-query attention of single tokens over pages, packed and plain, at the rate at which their bytes arrive.

A program is one warp. The grid is fixed; what there is to do is read from device memory, so one captured graph serves
any lengths: all pages of all rows and heads are numbered in one line (row, then KV head, then page), and every program
takes an equal stretch of it, give or take one. A stretch that covers all pages of a (row, head) writes the result;
others leave a part, and `merge` adds the parts of a pair by their log-sum-exp.

Per half page of 16 tokens: S = K q, one tensor-core product a group of 16 channels, scaled by the group's power of two
in float32; p = 2^(S - m) with the running maximum m; O += V p, where V's elements are multiplied as the integers they
are and the group's power of two goes to p. Elements become FP16 (K) or BF16 (V) in registers, exactly. Heads are the
eight columns of the product, so one pass over the bytes serves up to eight query heads at the same cost.

Packed pages do not change while a step runs, nor do lengths and tables, so a program finds its place and begins to load
before the kernel in front of it, which writes queries and the step's own tokens, is over.

Error: products and sums are float32, p is rounded to BF16 (2^-9 relative), which for values without a common sign
leaves about 1e-3 of the output; everything else is below 1e-4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hma_serve.decode.kernels.warp import (
    biased_to_f16,
    e4m3_to_bf16,
    int8_to_bf16,
    load_1,
    load_4,
    load_words,
    max_over_rows,
    mma_bf16,
    mma_f16,
    multiply_bf16,
    pack_bf16,
    power_of_two,
    powers_of_two_bf16,
    sum_over_rows,
    transpose,
)

INTEGERS = tl.constexpr(0)
E4M3 = tl.constexpr(1)
"""What 8-bit elements are."""

POWERS = tl.constexpr(0)
TOKENS = tl.constexpr(1)
"""What scales are: a biased exponent per token and 16 channels, or a float32 per token."""

# An E4M3 code read as a BF16 is 2^120 too small; half of that goes to the other operand, half to the result.
_HALF_OF_120 = tl.constexpr(2.0**60)
_HALF_OF_120_BF16 = tl.constexpr(0x5D805D80)
UNIT_WORDS = tl.constexpr(4)
"""Words of an address's unit of 16 bytes."""

_NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _zeros(COUNT: tl.constexpr):
    zero = tl.zeros([32], tl.float32)
    zeros = (zero,)
    for _ in tl.static_range(COUNT - 1):
        zeros = zeros + (zero,)
    return zeros


@triton.jit
def _query(pointers, inside, GROUPS: tl.constexpr):
    """The right operand of every group: two registers of two channels, one column a head."""
    registers = ()
    for group in tl.static_range(GROUPS):
        registers = registers + (
            tl.load(pointers + group * 8, mask=inside, other=0),
            tl.load(pointers + group * 8 + 4, mask=inside, other=0),
        )
    return registers


@triton.jit
def _enlarged(query, GROUPS: tl.constexpr, PTX: tl.constexpr):
    """The query times 2^60."""
    factor = tl.full([32], _HALF_OF_120_BF16, tl.int32)
    registers = ()
    for i in tl.static_range(2 * GROUPS):
        registers = registers + (multiply_bf16(query[i], factor, PTX),)
    return registers


@triton.jit
def _load_half(
    key, value, half, lane, D: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, PTX: tl.constexpr
):
    """All that half a page of keys and one of values hold for a lane: elements of K and V, then scales of K and V."""
    GROUPS: tl.constexpr = D // 16
    words = ()
    for pair in tl.static_range(GROUPS // 2):
        words = words + load_4(key + (half * (4 * D) + pair * 128) + lane * 4, PTX)
    for pair in tl.static_range(GROUPS // 2):
        words = words + load_4(value + (half * (4 * D) + pair * 128) + lane * 4, PTX)
    if K_SCALES == POWERS:
        words = words + load_words(key + (8 * D + half * (D // 4)) + (lane // 4) * (GROUPS // 2), GROUPS // 2, PTX)
    else:
        words = words + load_1(key + (8 * D + half * 16) + lane // 4, PTX)
        words = words + load_1(key + (8 * D + half * 16 + 8) + lane // 4, PTX)
    if V_SCALES == POWERS:
        words = words + load_words(value + (8 * D + half * (D // 4)) + (lane % 4) * GROUPS, GROUPS, PTX)
    else:
        words = words + load_1(value + (8 * D + half * 16) + lane // 4, PTX)
        words = words + load_1(value + (8 * D + half * 16 + 8) + lane // 4, PTX)
    return words


@triton.jit
def _packed_scores(
    words, query, D: tl.constexpr, ELEMENTS: tl.constexpr, SCALES: tl.constexpr, AT: tl.constexpr, PTX: tl.constexpr
):
    """Scores of 16 tokens, but for the query's scale and the format's constant; scales stand at AT."""
    GROUPS: tl.constexpr = D // 16
    zero = tl.zeros([32], tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for group in tl.static_range(GROUPS):
        b0, b1 = query[2 * group], query[2 * group + 1]
        if SCALES == POWERS:
            c0, c1, c2, c3 = zero, zero, zero, zero
        else:
            c0, c1, c2, c3 = s0, s1, s2, s3
        if ELEMENTS == INTEGERS:
            a0, a1 = biased_to_f16(words[2 * group], PTX)
            a2, a3 = biased_to_f16(words[2 * group + 1], PTX)
            c0, c1, c2, c3 = mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX)
        else:
            a0, a1 = e4m3_to_bf16(words[2 * group], PTX)
            a2, a3 = e4m3_to_bf16(words[2 * group + 1], PTX)
            c0, c1, c2, c3 = mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX)
        if SCALES == POWERS:
            upper = power_of_two(words[AT + group // 4], group % 4)
            lower = power_of_two(words[AT + (GROUPS + group) // 4], (GROUPS + group) % 4)
            s0, s1, s2, s3 = s0 + c0 * upper, s1 + c1 * upper, s2 + c2 * lower, s3 + c3 * lower
        else:
            s0, s1, s2, s3 = c0, c1, c2, c3
    if SCALES == TOKENS:
        upper = words[AT].to(tl.float32, bitcast=True)
        lower = words[AT + 1].to(tl.float32, bitcast=True)
        s0, s1, s2, s3 = s0 * upper, s1 * upper, s2 * lower, s3 * lower
    return s0, s1, s2, s3


@triton.jit
def _packed_values(
    words,
    b0,
    b1,
    sums,
    D: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
    AT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Adds 16 tokens' values, weighted, to the sums: four registers a group."""
    GROUPS: tl.constexpr = D // 16
    added = ()
    for group in tl.static_range(GROUPS):
        if ELEMENTS == INTEGERS:
            a0, a1 = int8_to_bf16(words[2 * GROUPS + 2 * group], PTX)
            a2, a3 = int8_to_bf16(words[2 * GROUPS + 2 * group + 1], PTX)
        else:
            a0, a1 = e4m3_to_bf16(words[2 * GROUPS + 2 * group], PTX)
            a2, a3 = e4m3_to_bf16(words[2 * GROUPS + 2 * group + 1], PTX)
        if SCALES == POWERS:
            w0 = multiply_bf16(b0, powers_of_two_bf16(words[AT + group], False, PTX), PTX)
            w1 = multiply_bf16(b1, powers_of_two_bf16(words[AT + group], True, PTX), PTX)
        else:
            w0, w1 = b0, b1
        added = added + _into(a0, a1, a2, a3, w0, w1, sums, group, PTX)
    return added


@triton.jit
def _into(a0, a1, a2, a3, b0, b1, sums, group: tl.constexpr, PTX: tl.constexpr):
    c0, c1, c2, c3 = mma_bf16(
        a0, a1, a2, a3, b0, b1, sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3], PTX
    )
    return (c0, c1, c2, c3)


@triton.jit
def _plain_scores(page, half, lane, query, D: tl.constexpr, PTX: tl.constexpr):
    zero = tl.zeros([32], tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for group in tl.static_range(D // 16):
        a0, a1, a2, a3 = load_4(page + (half * (8 * D) + group * 128) + lane * 4, PTX)
        s0, s1, s2, s3 = mma_bf16(a0, a1, a2, a3, query[2 * group], query[2 * group + 1], s0, s1, s2, s3, PTX)
    return s0, s1, s2, s3


@triton.jit
def _plain_values(page, half, lane, left, b0, b1, sums, D: tl.constexpr, PTX: tl.constexpr):
    """As `_packed_values`; only `left` of the 16 tokens are written, and 0 times what stands elsewhere may be NaN."""
    near = left - 2 * (lane % 4)
    far = near - 8
    near = tl.where(near >= 2, -1, tl.where(near == 1, 0xFFFF, 0))
    far = tl.where(far >= 2, -1, tl.where(far == 1, 0xFFFF, 0))
    added = ()
    for group in tl.static_range(D // 16):
        a0, a1, a2, a3 = load_4(page + (half * (8 * D) + group * 128) + lane * 4, PTX)
        added = added + _into(a0 & near, a1 & near, a2 & far, a3 & far, b0, b1, sums, group, PTX)
    return added


@triton.jit
def _weights(s0, s1, s2, s3, upper, lower, m0, m1, l0, l1, sums, GROUPS: tl.constexpr, PTX: tl.constexpr):
    """From scores (base 2) to probabilities, times their tokens' factors, as a right operand.

    Moves maxima, sums and outputs to the new maximum.
    """
    n0 = tl.maximum(m0, max_over_rows(tl.maximum(s0, s2), PTX))
    n1 = tl.maximum(m1, max_over_rows(tl.maximum(s1, s3), PTX))
    r0, r1 = tl.exp2(m0 - n0), tl.exp2(m1 - n1)
    p0, p1, p2, p3 = tl.exp2(s0 - n0), tl.exp2(s1 - n1), tl.exp2(s2 - n0), tl.exp2(s3 - n1)
    l0 = l0 * r0 + (p0 + p2)
    l1 = l1 * r1 + (p1 + p3)
    moved = ()
    for group in tl.static_range(GROUPS):
        moved = moved + (
            sums[4 * group] * r0,
            sums[4 * group + 1] * r1,
            sums[4 * group + 2] * r0,
            sums[4 * group + 3] * r1,
        )
    b0 = transpose(pack_bf16(p0 * upper, p1 * upper, PTX), PTX)
    b1 = transpose(pack_bf16(p2 * lower, p3 * lower, PTX), PTX)
    return b0, b1, n0, n1, l0, l1, moved


@triton.jit
def _packed_half(
    words,
    query,
    q0,
    q1,
    o0,
    o1,
    m0,
    m1,
    l0,
    l1,
    sums,
    D: tl.constexpr,
    K_ELEMENTS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_ELEMENTS: tl.constexpr,
    V_SCALES: tl.constexpr,
    PTX: tl.constexpr,
):
    """16 packed tokens, loaded before."""
    GROUPS: tl.constexpr = D // 16
    K_AT: tl.constexpr = 4 * GROUPS
    V_AT: tl.constexpr = K_AT + (GROUPS // 2 if K_SCALES == POWERS else 2)
    s0, s1, s2, s3 = _packed_scores(words, query, D, K_ELEMENTS, K_SCALES, K_AT, PTX)
    s0, s1, s2, s3 = s0 * q0 + o0, s1 * q1 + o1, s2 * q0 + o0, s3 * q1 + o1
    upper = 1.0
    lower = 1.0
    if V_SCALES == TOKENS:
        upper = words[V_AT].to(tl.float32, bitcast=True)
        lower = words[V_AT + 1].to(tl.float32, bitcast=True)
    if V_ELEMENTS == E4M3:
        upper = upper * _HALF_OF_120
        lower = lower * _HALF_OF_120
    b0, b1, m0, m1, l0, l1, sums = _weights(s0, s1, s2, s3, upper, lower, m0, m1, l0, l1, sums, GROUPS, PTX)
    sums = _packed_values(words, b0, b1, sums, D, V_ELEMENTS, V_SCALES, V_AT, PTX)
    return m0, m1, l0, l1, sums


@triton.jit
def attend(
    Q16,  # int32 view of fp16 [rows, heads, D]: queries, times a power of two a head
    QBF,  # int32 view of bf16 [rows, heads, D]
    QSCALE,  # fp32 [rows, heads]: undoes that power of two
    QOFFSET,  # fp32 [rows, heads]: q . c of the packed keys' offset
    MEMORY,  # int32 [KV heads, words]: one layer of the pool
    KTABLE,  # int32 [slots, table]: addresses of a sequence's pages, packed ones first
    VTABLE,
    SLOT,  # int32 [rows]: whose table a row reads
    PACKED,  # int32 [rows]: packed pages
    LENGTH,  # int32 [rows]: tokens that the row sees
    FIRST,  # int32 [rows + 1]: pages of all rows before
    BEGIN,  # int32 [programs + 1]: where a program's stretch begins
    ROW,  # int32 [programs]: the row of that
    OUT,  # [rows, heads, D]
    PART,  # fp32 [2 * programs, G, D]
    PART_ML,  # fp32 [2 * programs, 2, 8]
    scale,  # of scores, times log2(e)
    table_stride,
    head_words,  # from head to head
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    K_ELEMENTS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_ELEMENTS: tl.constexpr,
    V_SCALES: tl.constexpr,
    OFFSET: tl.constexpr,
    PTX: tl.constexpr,
):
    """One warp's stretch of pages. See the module.

    `number_pages` must be over when the kernel before this one begins.
    """
    GROUPS: tl.constexpr = D // 16
    K_FACTOR: tl.constexpr = _HALF_OF_120 if K_ELEMENTS == E4M3 else 0.015625 if K_SCALES == POWERS else 1.0
    V_FACTOR: tl.constexpr = _HALF_OF_120 if V_ELEMENTS == E4M3 else 0.015625 if V_SCALES == POWERS else 1.0
    lane = tl.arange(0, 32)
    program = tl.program_id(0)
    unit = tl.load(BEGIN + program)
    end = tl.load(BEGIN + program + 1)
    row = tl.load(ROW + program)
    while unit < end:
        first = tl.load(FIRST + row)
        pages = tl.load(FIRST + row + 1) - first
        if pages > 0:
            head = (unit - first * KV) // pages
            page = unit - first * KV - head * pages
            stop = tl.minimum(pages, page + end - unit)
            slot = tl.load(SLOT + row)
            packed = tl.load(PACKED + row)
            length = tl.load(LENGTH + row)
            ktable = KTABLE + slot.to(tl.int64) * table_stride
            vtable = VTABLE + slot.to(tl.int64) * table_stride
            memory = MEMORY + head.to(tl.int64) * head_words
            k = memory + tl.load(ktable + page).to(tl.int64) * UNIT_WORDS
            v = memory + tl.load(vtable + page).to(tl.int64) * UNIT_WORDS
            # If the page is not packed this is in vain, and what it reads may just be written.
            held = _load_half(k, v, 0, lane, D, K_SCALES, V_SCALES, PTX)
            if PTX:
                gdc_wait()
                gdc_launch_dependents()
            place = (row * KV + head) * G
            column = lane // 4
            inside = column < G
            words = (place + column) * (D // 2) + lane % 4
            h0 = 2 * (lane % 4)
            o0 = tl.zeros([32], tl.float32)
            o1 = tl.zeros([32], tl.float32)
            if OFFSET:
                o0 = tl.load(QOFFSET + place + h0, mask=h0 < G, other=0.0) * scale
                o1 = tl.load(QOFFSET + place + h0 + 1, mask=h0 + 1 < G, other=0.0) * scale
            if K_ELEMENTS == INTEGERS:
                q0 = tl.load(QSCALE + place + h0, mask=h0 < G, other=0.0) * (scale * K_FACTOR)
                q1 = tl.load(QSCALE + place + h0 + 1, mask=h0 + 1 < G, other=0.0) * (scale * K_FACTOR)
                query = _query(Q16 + words, inside, GROUPS)
            else:
                q0 = tl.full([32], K_FACTOR, tl.float32) * scale
                q1 = q0
                query = _enlarged(_query(QBF + words, inside, GROUPS), GROUPS, PTX)
            m0 = tl.full([32], _NOTHING, tl.float32)
            m1 = tl.full([32], _NOTHING, tl.float32)
            l0 = tl.zeros([32], tl.float32)
            l1 = tl.zeros([32], tl.float32)
            sums = _zeros(4 * GROUPS)
            last = tl.minimum(stop, packed) - 1
            if page <= last:
                for p in range(page, last + 1):
                    # Loaded one half ahead; behind the last page its own second half, which is in the cache.
                    after = tl.minimum(p + 1, last)
                    k_after = tl.load(ktable + after).to(tl.int64)
                    v_after = tl.load(vtable + after).to(tl.int64)
                    ahead = _load_half(k, v, 1, lane, D, K_SCALES, V_SCALES, PTX)
                    m0, m1, l0, l1, sums = _packed_half(
                        held, query, q0, q1, o0, o1, m0, m1, l0, l1, sums,
                        D, K_ELEMENTS, K_SCALES, V_ELEMENTS, V_SCALES, PTX,
                    )  # fmt: skip
                    k = memory + k_after * UNIT_WORDS
                    v = memory + v_after * UNIT_WORDS
                    held = _load_half(k, v, (p == last).to(tl.int32), lane, D, K_SCALES, V_SCALES, PTX)
                    m0, m1, l0, l1, sums = _packed_half(
                        ahead, query, q0, q1, o0, o1, m0, m1, l0, l1, sums,
                        D, K_ELEMENTS, K_SCALES, V_ELEMENTS, V_SCALES, PTX,
                    )  # fmt: skip
            if stop > packed:
                if V_FACTOR != 1.0:
                    scaled = ()
                    for i in tl.static_range(4 * GROUPS):
                        scaled = scaled + (sums[i] * V_FACTOR,)
                    sums = scaled
                plain_query = _query(QBF + words, inside, GROUPS)
                for p in range(tl.maximum(page, packed), stop):
                    kp = memory + tl.load(ktable + p).to(tl.int64) * UNIT_WORDS
                    vp = memory + tl.load(vtable + p).to(tl.int64) * UNIT_WORDS
                    for half in tl.static_range(2):
                        s0, s1, s2, s3 = _plain_scores(kp, half, lane, plain_query, D, PTX)
                        token = p * 32 + half * 16 + lane // 4
                        s0 = tl.where(token < length, s0 * scale, _NOTHING)
                        s1 = tl.where(token < length, s1 * scale, _NOTHING)
                        s2 = tl.where(token + 8 < length, s2 * scale, _NOTHING)
                        s3 = tl.where(token + 8 < length, s3 * scale, _NOTHING)
                        b0, b1, m0, m1, l0, l1, sums = _weights(
                            s0, s1, s2, s3, 1.0, 1.0, m0, m1, l0, l1, sums, GROUPS, PTX
                        )
                        sums = _plain_values(vp, half, lane, length - p * 32 - half * 16, b0, b1, sums, D, PTX)
            factor = tl.where(stop > packed, 1.0, V_FACTOR)
            l0 = sum_over_rows(l0, PTX)
            l1 = sum_over_rows(l1, PTX)
            if stop - page == pages:
                f0, f1 = factor / l0, factor / l1
                target = OUT + (place + h0) * D + lane // 4
                for group in tl.static_range(GROUPS):
                    to = target + group * 16
                    tl.store(to, (sums[4 * group] * f0).to(OUT.dtype.element_ty), mask=h0 < G)
                    tl.store(to + D, (sums[4 * group + 1] * f1).to(OUT.dtype.element_ty), mask=h0 + 1 < G)
                    tl.store(to + 8, (sums[4 * group + 2] * f0).to(OUT.dtype.element_ty), mask=h0 < G)
                    tl.store(to + D + 8, (sums[4 * group + 3] * f1).to(OUT.dtype.element_ty), mask=h0 + 1 < G)
            else:
                part = 2 * program + (page == 0).to(tl.int32)
                kept = PART + (part * G + h0) * D + lane // 4
                for group in tl.static_range(GROUPS):
                    at = kept + group * 16
                    tl.store(at, sums[4 * group] * factor, mask=h0 < G)
                    tl.store(at + D, sums[4 * group + 1] * factor, mask=h0 + 1 < G)
                    tl.store(at + 8, sums[4 * group + 2] * factor, mask=h0 < G)
                    tl.store(at + D + 8, sums[4 * group + 3] * factor, mask=h0 + 1 < G)
                tl.store(PART_ML + part * 16 + h0, m0, mask=lane < 4)
                tl.store(PART_ML + part * 16 + h0 + 1, m1, mask=lane < 4)
                tl.store(PART_ML + part * 16 + 8 + h0, l0, mask=lane < 4)
                tl.store(PART_ML + part * 16 + 8 + h0 + 1, l1, mask=lane < 4)
            unit += stop - page
            if unit == (first + pages) * KV:
                row += 1
        else:
            row += 1


@triton.jit
def merge(
    SHARED,  # int32 [2, rows, KV]: the first and the last program of a pair
    OUT,
    PART,
    PART_ML,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,  # looked at together
    CHANNELS: tl.constexpr,  # of a program
    PTX: tl.constexpr,
):
    """Some channels of one (row, head) of the output, if several programs of `attend` share it."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    pair = row * KV + head // G
    begin = tl.load(SHARED + pair)
    last = tl.load(SHARED + tl.num_programs(0) * KV + pair)
    if PTX:
        gdc_launch_dependents()
        gdc_wait()
    if last > begin:
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        line = tl.arange(0, PARTS)
        top = tl.full([PARTS], _NOTHING, tl.float32)
        total = tl.zeros([PARTS], tl.float32)
        sums = tl.zeros([PARTS, CHANNELS], tl.float32)
        for i in range(begin, last + 1, PARTS):
            program = i + line
            there = program <= last
            # Only the first of the pair's programs began it: its part is the one for that.
            part = 2 * program + (program == begin).to(tl.int32)
            m = tl.load(PART_ML + part * 16 + head % G, mask=there, other=_NOTHING)
            mass = tl.load(PART_ML + part * 16 + 8 + head % G, mask=there, other=0.0)
            o = tl.load(PART + (part * G + head % G)[:, None] * D + channel[None, :], mask=there[:, None], other=0.0)
            new = tl.maximum(top, m)
            old, now = tl.exp2(top - new), tl.exp2(m - new)
            total = total * old + mass * now
            sums = sums * old[:, None] + o * now[:, None]
            top = new
        weight = tl.exp2(top - tl.max(top, 0))
        result = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(OUT + (row * KV * G + head) * D + channel, result.to(OUT.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "programs", "least", "kind"])
def number_pages(
    LENGTH,
    KIND,  # int32 [rows]
    FIRST,
    BEGIN,
    ROW,
    SHARED,
    rows,
    programs,
    least,  # pages of a program at least
    kind,  # rows of other kinds count as empty
    KV: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, at least rows
    CHUNK: tl.constexpr,
):
    """Cuts all pages into stretches; a chunk of programs and of (row, KV head) pairs a program of this kernel."""
    line = tl.arange(0, ROWS)
    length = tl.load(LENGTH + line, mask=line < rows, other=0)
    pages = tl.where(tl.load(KIND + line, mask=line < rows, other=-1) == kind, tl.cdiv(length, 32), 0)
    after = tl.cumsum(pages, 0)
    if tl.program_id(0) == 0:
        tl.store(FIRST, 0)
        tl.store(FIRST + 1 + line, after, mask=line < rows)
    units = tl.sum(pages, 0).to(tl.int64) * KV
    busy = tl.maximum(tl.minimum(programs.to(tl.int64), units // least), 1)
    program = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    begin = tl.minimum(program * units // busy, units).to(tl.int32)
    tl.store(BEGIN + program, begin, mask=program <= programs)
    row = tl.sum((after[None, :] <= (begin // KV)[:, None]).to(tl.int32), 1)
    tl.store(ROW + program, row, mask=program < programs)
    # Of pairs: the program whose stretch holds unit u is the largest i with i * units // busy <= u.
    mine = (program // KV)[:, None] == line[None, :]
    count = tl.sum(tl.where(mine, pages[None, :], 0), 1)
    start = (tl.sum(tl.where(mine, (after - pages)[None, :], 0), 1) * KV + program % KV * count).to(tl.int64)
    shared = SHARED + program
    first = ((start + 1) * busy - 1) // tl.maximum(units, 1)
    last = ((start + tl.maximum(count, 1)) * busy - 1) // tl.maximum(units, 1)
    tl.store(shared, first.to(tl.int32), mask=program < rows * KV)
    tl.store(shared + rows * KV, tl.where(count > 0, last, first).to(tl.int32), mask=program < rows * KV)
