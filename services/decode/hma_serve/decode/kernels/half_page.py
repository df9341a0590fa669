"""Attention's arithmetic on half a page: 16 tokens of a KV head under tiles of eight query columns, in one warp.

S = K q, one tensor-core product a group of 16 channels, scaled by the group's power of two in float32; p = 2^(S - m)
with the running maximum m; O += V p, where V's elements are multiplied as the integers they are and the group's power
of two goes to p. Elements become FP16 (K) or BF16 (V) in registers, exactly; what was loaded and converted serves all
tiles.

A lane's registers are tuples: four scores a tile, two maxima and two totals a tile, four sums a group and tile.

Error: products and sums are float32, p and the output are rounded to BF16 (2^-9 relative), which for values without a
common sign leaves 1e-3 to 2.4e-3 of the output, at most 3e-3 (relative L2 against float64 over the decoded cache,
asserted); everything else is below 1e-4.

Two limits, per token, KV head and 128 channels: 272 bytes (`tt_bfp8_b`; 512 of BF16) and about 27 warp instructions, of
which a multiprocessor can issue twice as many while an H200 brings the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hma_serve.decode.kernels.warp import (
    biased_to_f16,
    e4m3_scale,
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
    transpose,
)

INTEGERS = tl.constexpr(0)
E4M3 = tl.constexpr(1)
"""What 8-bit elements are."""

POWERS = tl.constexpr(0)
TOKENS = tl.constexpr(1)
CODES = tl.constexpr(2)
"""What scales are: a biased exponent per token and 16 channels; a float32 per token; or an E4M3 code per token and 16
channels, and a float32 of the page.

Integers count in 2^-6 under powers and in 2^-4 under codes."""

HALF_OF_120 = tl.constexpr(2.0**60)
"""An E4M3 code read as a BF16 or a float32 is 2^120 too small; half of that goes to the other operand or to what comes
next, half to the result."""

NOTHING = tl.constexpr(-1.0e30)
"""The score of a token that is not seen, and the maximum before there is one."""


@triton.jit
def filled(value, COUNT: tl.constexpr):
    """So many registers of a value."""
    each = tl.zeros([32], tl.float32) + value
    registers = (each,)
    for _ in tl.static_range(COUNT - 1):
        registers = registers + (each,)
    return registers


@triton.jit
def no_half(D: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr):
    """As many registers as `load_half` gives, of nothing."""
    GROUPS: tl.constexpr = D // 16
    K_WORDS: tl.constexpr = 2 if K_SCALES == TOKENS else GROUPS // 2 + (1 if K_SCALES == CODES else 0)
    V_WORDS: tl.constexpr = 2 if V_SCALES == TOKENS else GROUPS if V_SCALES == POWERS else GROUPS // 2 + 1
    nothing = tl.zeros([32], tl.int32)
    words = ()
    for _ in tl.static_range(4 * GROUPS + K_WORDS + V_WORDS):
        words = words + (nothing,)
    return words


@triton.jit
def load_half(
    key, value, half, lane, D: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, PTX: tl.constexpr
):
    """All that half a page of keys and one of values hold for a lane: elements of K and V, then scales of K and V."""
    GROUPS: tl.constexpr = D // 16
    words = ()
    for pair in tl.static_range(GROUPS // 2):
        words = words + load_4(key + (half * (4 * D) + pair * 128) + lane * 4, PTX)
    for pair in tl.static_range(GROUPS // 2):
        words = words + load_4(value + (half * (4 * D) + pair * 128) + lane * 4, PTX)
    if K_SCALES != TOKENS:
        words = words + load_words(key + (8 * D + half * (D // 4)) + (lane // 4) * (GROUPS // 2), GROUPS // 2, PTX)
        if K_SCALES == CODES:
            words = words + load_1(key + (8 * D + D // 2) + lane * 0, PTX)
    else:
        words = words + load_1(key + (8 * D + half * 16) + lane // 4, PTX)
        words = words + load_1(key + (8 * D + half * 16 + 8) + lane // 4, PTX)
    if V_SCALES == POWERS:
        words = words + load_words(value + (8 * D + half * (D // 4)) + (lane % 4) * GROUPS, GROUPS, PTX)
    elif V_SCALES == CODES:
        words = words + load_words(value + (8 * D + half * (D // 4)) + (lane // 4) * (GROUPS // 2), GROUPS // 2, PTX)
        words = words + load_1(value + (8 * D + D // 2) + lane * 0, PTX)
    else:
        words = words + load_1(value + (8 * D + half * 16) + lane // 4, PTX)
        words = words + load_1(value + (8 * D + half * 16 + 8) + lane // 4, PTX)
    return words


@triton.jit
def packed_half(
    words,
    query,
    factors,
    offsets,
    maxima,
    totals,
    sums,
    D: tl.constexpr,
    TILES: tl.constexpr,
    K_ELEMENTS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_ELEMENTS: tl.constexpr,
    V_SCALES: tl.constexpr,
    PTX: tl.constexpr,
):
    """16 packed tokens, loaded before."""
    GROUPS: tl.constexpr = D // 16
    K_AT: tl.constexpr = 4 * GROUPS
    V_AT: tl.constexpr = K_AT + (2 if K_SCALES == TOKENS else GROUPS // 2 + (1 if K_SCALES == CODES else 0))
    raw = _packed_scores(words, query, D, TILES, K_ELEMENTS, K_SCALES, K_AT, PTX)
    scores = ()
    for tile in tl.static_range(TILES):
        q0, q1, o0, o1 = factors[2 * tile], factors[2 * tile + 1], offsets[2 * tile], offsets[2 * tile + 1]
        scores = scores + (raw[4 * tile] * q0 + o0, raw[4 * tile + 1] * q1 + o1)
        scores = scores + (raw[4 * tile + 2] * q0 + o0, raw[4 * tile + 3] * q1 + o1)
    upper = 1.0
    lower = 1.0
    if V_SCALES == TOKENS:
        upper = words[V_AT].to(tl.float32, bitcast=True)
        lower = words[V_AT + 1].to(tl.float32, bitcast=True)
    elif V_SCALES == CODES:
        upper = words[V_AT + GROUPS // 2].to(tl.float32, bitcast=True)
        lower = upper
    if V_ELEMENTS == E4M3 or V_SCALES == CODES:
        upper = upper * HALF_OF_120
        lower = lower * HALF_OF_120
    weights, maxima, totals, sums = _weights(scores, upper, lower, maxima, totals, sums, GROUPS, TILES, V_SCALES, PTX)
    sums = _packed_values(words, weights, sums, D, TILES, V_ELEMENTS, V_SCALES, V_AT, PTX)
    return maxima, totals, sums


@triton.jit
def plain_half(
    key,
    value,
    page,
    half: tl.constexpr,
    lane,
    query,
    length,
    written,
    scale,
    maxima,
    totals,
    sums,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
):
    """16 plain tokens of a page; `written` tokens of the sequence are there; columns see `length` or more."""
    scores = _plain_scores(key, half, lane, query, D, TILES, PTX)
    token = page * 32 + half * 16 + lane // 4
    scores = _seen(scores, token, length, lane, written, scale, G, QUERIES, TILES)
    weights, maxima, totals, sums = _weights(scores, 1.0, 1.0, maxima, totals, sums, D // 16, TILES, POWERS, PTX)
    left = written - page * 32 - half * 16
    sums = _plain_values(value, half, lane, left, weights, sums, D, TILES, PTX)
    return maxima, totals, sums


@triton.jit
def _packed_scores(
    words,
    query,
    D: tl.constexpr,
    TILES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
    AT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Scores of 16 tokens, but for the query's scale and the format's constant; scales stand at AT.

    Four registers a tile, as all scores here.
    """
    GROUPS: tl.constexpr = D // 16
    zero = tl.zeros([32], tl.float32)
    scores = filled(0.0, 4 * TILES)
    for group in tl.static_range(GROUPS):
        if ELEMENTS == INTEGERS:
            a0, a1 = biased_to_f16(words[2 * group], PTX)
            a2, a3 = biased_to_f16(words[2 * group + 1], PTX)
        else:
            a0, a1 = e4m3_to_bf16(words[2 * group], PTX)
            a2, a3 = e4m3_to_bf16(words[2 * group + 1], PTX)
        if SCALES == POWERS:
            upper = power_of_two(words[AT + group // 4], group % 4)
            lower = power_of_two(words[AT + (GROUPS + group) // 4], (GROUPS + group) % 4)
        elif SCALES == CODES:
            upper = e4m3_scale(words[AT + group // 4], group % 4)
            lower = e4m3_scale(words[AT + (GROUPS + group) // 4], (GROUPS + group) % 4)
        added = ()
        for tile in tl.static_range(TILES):
            s0, s1, s2, s3 = scores[4 * tile], scores[4 * tile + 1], scores[4 * tile + 2], scores[4 * tile + 3]
            b0, b1 = query[2 * (group * TILES + tile)], query[2 * (group * TILES + tile) + 1]
            if SCALES == TOKENS:
                c0, c1, c2, c3 = s0, s1, s2, s3
            else:
                c0, c1, c2, c3 = zero, zero, zero, zero
            if ELEMENTS == INTEGERS:
                c0, c1, c2, c3 = mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX)
            else:
                c0, c1, c2, c3 = mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX)
            if SCALES != TOKENS:
                c0, c1, c2, c3 = s0 + c0 * upper, s1 + c1 * upper, s2 + c2 * lower, s3 + c3 * lower
            added = added + (c0, c1, c2, c3)
        scores = added
    if SCALES == TOKENS:
        upper = words[AT].to(tl.float32, bitcast=True)
        lower = words[AT + 1].to(tl.float32, bitcast=True)
        scaled = ()
        for tile in tl.static_range(TILES):
            scaled = scaled + (scores[4 * tile] * upper, scores[4 * tile + 1] * upper)
            scaled = scaled + (scores[4 * tile + 2] * lower, scores[4 * tile + 3] * lower)
        scores = scaled
    elif SCALES == CODES:
        page = words[AT + GROUPS // 2].to(tl.float32, bitcast=True)
        scaled = ()
        for at in tl.static_range(4 * TILES):
            scaled = scaled + (scores[at] * HALF_OF_120 * page,)
        scores = scaled
    return scores


@triton.jit
def _packed_values(
    words,
    weights,
    sums,
    D: tl.constexpr,
    TILES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
    AT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Adds 16 tokens' values, weighted, to the sums: four registers a group and tile."""
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
            near = powers_of_two_bf16(words[AT + group], False, PTX)
            far = powers_of_two_bf16(words[AT + group], True, PTX)
        elif SCALES == CODES:
            near = e4m3_scale(words[AT + group // 4], group % 4)
            far = e4m3_scale(words[AT + (GROUPS + group) // 4], (GROUPS + group) % 4)
        for tile in tl.static_range(TILES):
            if SCALES == CODES:
                p0, p1, p2, p3 = weights[4 * tile], weights[4 * tile + 1], weights[4 * tile + 2], weights[4 * tile + 3]
                b0, b1 = _operand(p0 * near, p1 * near, p2 * far, p3 * far, PTX)
            else:
                b0, b1 = weights[2 * tile], weights[2 * tile + 1]
            if SCALES == POWERS:
                b0, b1 = multiply_bf16(b0, near, PTX), multiply_bf16(b1, far, PTX)
            added = added + _into(a0, a1, a2, a3, b0, b1, sums, group * TILES + tile, PTX)
    return added


@triton.jit
def _plain_scores(page, half, lane, query, D: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    scores = filled(0.0, 4 * TILES)
    for group in tl.static_range(D // 16):
        a0, a1, a2, a3 = load_4(page + (half * (8 * D) + group * 128) + lane * 4, PTX)
        added = ()
        for tile in tl.static_range(TILES):
            b0, b1 = query[2 * (group * TILES + tile)], query[2 * (group * TILES + tile) + 1]
            added = added + _into(a0, a1, a2, a3, b0, b1, scores, tile, PTX)
        scores = added
    return scores


@triton.jit
def _seen(scores, token, length, lane, last, scale, G: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr):
    """Scores of tokens `token` and 8 further, scaled, as far as each column sees: `length` tokens, one more a token."""
    masked = ()
    for tile in tl.static_range(TILES):
        column = 8 * tile + 2 * (lane % 4)
        if QUERIES == 1:
            l0 = length
            l1 = length
        else:
            l0 = tl.minimum(length + column // G, last)
            l1 = tl.minimum(length + (column + 1) // G, last)
        masked = masked + (
            tl.where(token < l0, scores[4 * tile] * scale, NOTHING),
            tl.where(token < l1, scores[4 * tile + 1] * scale, NOTHING),
            tl.where(token + 8 < l0, scores[4 * tile + 2] * scale, NOTHING),
            tl.where(token + 8 < l1, scores[4 * tile + 3] * scale, NOTHING),
        )
    return masked


@triton.jit
def _plain_values(page, half, lane, left, weights, sums, D: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """As `_packed_values`; only `left` of the 16 tokens are written, and 0 times what stands elsewhere may be NaN."""
    near = left - 2 * (lane % 4)
    far = near - 8
    near = tl.where(near >= 2, -1, tl.where(near == 1, 0xFFFF, 0))
    far = tl.where(far >= 2, -1, tl.where(far == 1, 0xFFFF, 0))
    added = ()
    for group in tl.static_range(D // 16):
        a0, a1, a2, a3 = load_4(page + (half * (8 * D) + group * 128) + lane * 4, PTX)
        a0, a1, a2, a3 = a0 & near, a1 & near, a2 & far, a3 & far
        for tile in tl.static_range(TILES):
            b0, b1 = weights[2 * tile], weights[2 * tile + 1]
            added = added + _into(a0, a1, a2, a3, b0, b1, sums, group * TILES + tile, PTX)
    return added


@triton.jit
def _weights(
    scores,
    upper,
    lower,
    maxima,
    totals,
    sums,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    SCALES: tl.constexpr,
    PTX: tl.constexpr,
):
    """From scores (base 2) to probabilities, times their tokens' factors.

    As a right operand, two registers a tile; or four in float32, where each group has factors of its own that are no
    powers of two, so that nothing is rounded twice. Moves maxima, totals and sums to the new maxima.
    """
    weights = ()
    tops = ()
    masses = ()
    ratios = ()
    for tile in tl.static_range(TILES):
        s0, s1, s2, s3 = scores[4 * tile], scores[4 * tile + 1], scores[4 * tile + 2], scores[4 * tile + 3]
        m0, m1 = maxima[2 * tile], maxima[2 * tile + 1]
        n0 = tl.maximum(m0, max_over_rows(tl.maximum(s0, s2), PTX))
        n1 = tl.maximum(m1, max_over_rows(tl.maximum(s1, s3), PTX))
        r0, r1 = tl.exp2(m0 - n0), tl.exp2(m1 - n1)
        p0, p1, p2, p3 = tl.exp2(s0 - n0), tl.exp2(s1 - n1), tl.exp2(s2 - n0), tl.exp2(s3 - n1)
        if SCALES == CODES:
            weights = weights + (p0 * upper, p1 * upper, p2 * lower, p3 * lower)
        else:
            weights = weights + _operand(p0 * upper, p1 * upper, p2 * lower, p3 * lower, PTX)
        tops = tops + (n0, n1)
        masses = masses + (totals[2 * tile] * r0 + (p0 + p2), totals[2 * tile + 1] * r1 + (p1 + p3))
        ratios = ratios + (r0, r1)
    moved = ()
    for at in tl.static_range(GROUPS * TILES):
        r0, r1 = ratios[2 * (at % TILES)], ratios[2 * (at % TILES) + 1]
        moved = moved + (sums[4 * at] * r0, sums[4 * at + 1] * r1, sums[4 * at + 2] * r0, sums[4 * at + 3] * r1)
    return weights, tops, masses, moved


@triton.jit
def _operand(p0, p1, p2, p3, PTX: tl.constexpr):
    """Probabilities, rounded, as a right operand."""
    return transpose(pack_bf16(p0, p1, PTX), PTX), transpose(pack_bf16(p2, p3, PTX), PTX)


@triton.jit
def _into(a0, a1, a2, a3, b0, b1, sums, at: tl.constexpr, PTX: tl.constexpr):
    c0, c1, c2, c3 = mma_bf16(
        a0, a1, a2, a3, b0, b1, sums[4 * at], sums[4 * at + 1], sums[4 * at + 2], sums[4 * at + 3], PTX
    )
    return (c0, c1, c2, c3)
