"""Grouped-query attention of a sequence's last tokens over its pages, packed and plain, at the rate of their bytes.

A program is one warp. The grid is fixed; what there is to do is read from device memory, so one captured graph serves
any lengths: all pages of all rows and heads are numbered in one line (row, then KV head, then page), and every program
takes an equal stretch of it, give or take one. A stretch that covers all pages of a (row, head) writes the result;
others leave a part. `merge` adds the parts of a pair by their log-sum-exp, or the last program to leave one does.

Per half page of 16 tokens: S = K q, one tensor-core product a group of 16 channels, scaled by the group's power of two
in float32; p = 2^(S - m) with the running maximum m; O += V p, where V's elements are multiplied as the integers they
are and the group's power of two goes to p. Elements become FP16 (K) or BF16 (V) in registers, exactly. Heads are the
eight columns of the product, so one pass over the bytes serves up to eight query heads at the same cost.

Several query tokens of a sequence form a *block*: rows that follow one another and are read together. A column is then
a head of a token, there are as many *tiles* of eight columns as that takes, and what was loaded and converted serves
all of them. Packed tokens are older than any that asks, so only plain ones are masked, column by column.

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
    sum_over_rows,
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

# An E4M3 code read as a BF16 or a float32 is 2^120 too small; half of that goes to the other operand or to what comes
# next, half to the result.
_HALF_OF_120 = tl.constexpr(2.0**60)
_HALF_OF_120_BF16 = tl.constexpr(0x5D805D80)
UNIT_WORDS = tl.constexpr(4)
"""Words of an address's unit of 16 bytes."""

_NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _place(column, row, head, KV: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr):
    """Where a block's column stands among [rows, heads]: heads of its first token, then of the next."""
    if QUERIES == 1:
        place = (row * KV + head) * G + column
    else:
        place = ((row + column // G) * KV + head) * G + column % G
    return place


@triton.jit
def _query(
    QUERY,
    lane,
    row,
    head,
    columns,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
):
    """The right operand of every group and tile: two registers of two channels, one column a head of a token."""
    registers = ()
    for group in tl.static_range(D // 16):
        for tile in tl.static_range(TILES):
            column = 8 * tile + lane // 4
            pointers = QUERY + _place(column, row, head, KV, G, QUERIES) * (D // 2) + lane % 4 + group * 8
            registers = registers + (
                tl.load(pointers, mask=column < columns, other=0),
                tl.load(pointers + 4, mask=column < columns, other=0),
            )
    return registers


@triton.jit
def _of_columns(
    VALUES,
    lane,
    row,
    head,
    columns,
    scale,
    KV: tl.constexpr,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
):
    """What stands in [rows, heads] of a lane's two columns of every tile, times `scale`."""
    values = ()
    for tile in tl.static_range(TILES):
        column = 8 * tile + 2 * (lane % 4)
        place = VALUES + _place(column, row, head, KV, G, QUERIES)
        after = VALUES + _place(column + 1, row, head, KV, G, QUERIES)
        values = values + (
            tl.load(place, mask=column < columns, other=0.0) * scale,
            tl.load(after, mask=column + 1 < columns, other=0.0) * scale,
        )
    return values


@triton.jit
def _filled(value, COUNT: tl.constexpr):
    each = tl.zeros([32], tl.float32) + value
    filled = (each,)
    for _ in tl.static_range(COUNT - 1):
        filled = filled + (each,)
    return filled


@triton.jit
def _enlarged(query, COUNT: tl.constexpr, PTX: tl.constexpr):
    """The query's registers times 2^60."""
    factor = tl.full([32], _HALF_OF_120_BF16, tl.int32)
    registers = ()
    for i in tl.static_range(COUNT):
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
    scores = _filled(0.0, 4 * TILES)
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
            scaled = scaled + (scores[at] * _HALF_OF_120 * page,)
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
def _into(a0, a1, a2, a3, b0, b1, sums, at: tl.constexpr, PTX: tl.constexpr):
    c0, c1, c2, c3 = mma_bf16(
        a0, a1, a2, a3, b0, b1, sums[4 * at], sums[4 * at + 1], sums[4 * at + 2], sums[4 * at + 3], PTX
    )
    return (c0, c1, c2, c3)


@triton.jit
def _plain_scores(page, half, lane, query, D: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    scores = _filled(0.0, 4 * TILES)
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
            tl.where(token < l0, scores[4 * tile] * scale, _NOTHING),
            tl.where(token < l1, scores[4 * tile + 1] * scale, _NOTHING),
            tl.where(token + 8 < l0, scores[4 * tile + 2] * scale, _NOTHING),
            tl.where(token + 8 < l1, scores[4 * tile + 3] * scale, _NOTHING),
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
def _operand(p0, p1, p2, p3, PTX: tl.constexpr):
    """Probabilities, rounded, as a right operand."""
    return transpose(pack_bf16(p0, p1, PTX), PTX), transpose(pack_bf16(p2, p3, PTX), PTX)


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
def _packed_half(
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
        upper = upper * _HALF_OF_120
        lower = lower * _HALF_OF_120
    weights, maxima, totals, sums = _weights(scores, upper, lower, maxima, totals, sums, GROUPS, TILES, V_SCALES, PTX)
    sums = _packed_values(words, weights, sums, D, TILES, V_ELEMENTS, V_SCALES, V_AT, PTX)
    return maxima, totals, sums


@triton.jit
def _store(to, after, column, columns, sums, tile: tl.constexpr, f0, f1, GROUPS: tl.constexpr, TILES: tl.constexpr):
    """A tile's two columns of a lane, times their factors."""
    kind: tl.constexpr = to.dtype.element_ty
    for group in tl.static_range(GROUPS):
        first = sums[4 * (group * TILES + tile)]
        second = sums[4 * (group * TILES + tile) + 1]
        tl.store(to + group * 16, (first * f0).to(kind), mask=column < columns)
        tl.store(after + group * 16, (second * f1).to(kind), mask=column + 1 < columns)
        first = sums[4 * (group * TILES + tile) + 2]
        second = sums[4 * (group * TILES + tile) + 3]
        tl.store(to + group * 16 + 8, (first * f0).to(kind), mask=column < columns)
        tl.store(after + group * 16 + 8, (second * f1).to(kind), mask=column + 1 < columns)


@triton.jit
def _merged(
    PART,
    PART_ML,
    begin,
    last,
    column,
    wanted,
    channel,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,  # looked at together
):
    """What a pair's programs from `begin` to `last` found, of some of its wanted columns and some channels."""
    PADDED: tl.constexpr = (COLUMNS + 7) // 8 * 8
    line = tl.arange(0, PARTS)[:, None]
    top = tl.full([PARTS, column.shape[0]], _NOTHING, tl.float32)
    total = tl.zeros([PARTS, column.shape[0]], tl.float32)
    sums = tl.zeros([PARTS, column.shape[0], channel.shape[0]], tl.float32)
    for i in range(begin, last + 1, PARTS):
        program = i + line
        there = (program <= last) & wanted[None, :]
        # Only the first of the pair's programs began it: its part is the one for that.
        part = 2 * program + (program == begin).to(tl.int32)
        masses = PART_ML + part * (2 * PADDED) + column[None, :]
        m = tl.load(masses, mask=there, other=_NOTHING)
        # What is not there weighs nothing beside the smallest score of what is.
        mass = tl.load(masses + PADDED, mask=there, other=1.0)
        at = (part * COLUMNS + column[None, :])[:, :, None] * D + channel[None, None, :]
        o = tl.load(PART + at, mask=there[:, :, None], other=0.0)
        new = tl.maximum(top, m)
        old, now = tl.exp2(top - new), tl.exp2(m - new)
        total = total * old + mass * now
        sums = sums * old[:, :, None] + o * now[:, :, None]
        top = new
    weight = tl.exp2(top - tl.max(top, 0)[None, :])
    return tl.sum(sums * weight[:, :, None], 0) / tl.sum(total * weight, 0)[:, None]


@triton.jit
def _fold(
    OUT,
    PART,
    PART_ML,
    begin,
    last,
    row,
    head,
    columns,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """`merge` of a whole pair by one warp: two parts of four columns at once, which its registers hold."""
    CHANNELS: tl.constexpr = D & -D
    for start in range(0, columns, 4):
        column = start + tl.arange(0, 4)
        wanted = column < columns
        for first in tl.static_range(0, D, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            result = _merged(PART, PART_ML, begin, last, column, wanted, channel, D, QUERIES * G, 2)
            place = _place(column, row, head, KV, G, QUERIES)[:, None] * D + channel[None, :]
            tl.store(OUT + place, result.to(OUT.dtype.element_ty), mask=wanted[:, None])


@triton.jit(do_not_specialize=["pairs"])
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
    MORE,  # int32 [rows]: see `StepRows`
    FIRST,  # int32 [rows + 1]: pages of all rows before
    BEGIN,  # int32 [programs + 1]: where a program's stretch begins
    ROW,  # int32 [programs]: the row of that
    SHARED,  # int32 [2, rows, KV]: the first and the last program of a (row, KV head)
    DONE,  # int32 [rows, KV], zeros: how many of its programs have left their part
    OUT,  # [rows, heads, D]
    PART,  # fp32 [2 * programs, QUERIES * G, D]
    PART_ML,  # fp32 [2 * programs, 2, 8 * tiles]
    scale,  # of scores, times log2(e)
    table_stride,
    head_words,  # from head to head
    pairs,  # rows * KV
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,  # query tokens of a block at most
    FOLD: tl.constexpr,  # parts that the last program to leave one adds itself, at most
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
    COLUMNS: tl.constexpr = QUERIES * G
    TILES: tl.constexpr = (COLUMNS + 7) // 8
    K_INTEGER: tl.constexpr = 2.0**-6 if K_SCALES == POWERS else 2.0**56 if K_SCALES == CODES else 1.0
    V_INTEGER: tl.constexpr = 2.0**-6 if V_SCALES == POWERS else 2.0**56 if V_SCALES == CODES else 1.0
    K_FACTOR: tl.constexpr = _HALF_OF_120 if K_ELEMENTS == E4M3 else K_INTEGER
    V_FACTOR: tl.constexpr = _HALF_OF_120 if V_ELEMENTS == E4M3 else V_INTEGER
    lane = tl.arange(0, 32)
    program = tl.program_id(0)
    unit = tl.load(BEGIN + program)
    end = tl.load(BEGIN + program + 1)
    row = tl.load(ROW + program)
    if PTX and unit >= end:
        # So that a kernel behind this one that waits for it has waited for the one before it, too.
        gdc_wait()
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
            more = 0
            if QUERIES > 1:
                more = tl.load(MORE + row)
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
            columns = (more + 1) * G
            factors = _filled(scale * K_FACTOR, 2 * TILES)
            if K_ELEMENTS == INTEGERS:
                query = _query(Q16, lane, row, head, columns, KV, G, D, QUERIES, TILES)
                factors = _of_columns(QSCALE, lane, row, head, columns, scale * K_FACTOR, KV, G, QUERIES, TILES)
            else:
                query = _query(QBF, lane, row, head, columns, KV, G, D, QUERIES, TILES)
                query = _enlarged(query, 2 * GROUPS * TILES, PTX)
            offsets = _filled(0.0, 2 * TILES)
            if OFFSET:
                offsets = _of_columns(QOFFSET, lane, row, head, columns, scale, KV, G, QUERIES, TILES)
            maxima = _filled(_NOTHING, 2 * TILES)
            totals = _filled(0.0, 2 * TILES)
            sums = _filled(0.0, 4 * GROUPS * TILES)
            last = tl.minimum(stop, packed) - 1
            if page <= last:
                for p in range(page, last + 1):
                    # Loaded one half ahead; behind the last page its own second half, which is in the cache.
                    after = tl.minimum(p + 1, last)
                    k_after = tl.load(ktable + after).to(tl.int64)
                    v_after = tl.load(vtable + after).to(tl.int64)
                    ahead = _load_half(k, v, 1, lane, D, K_SCALES, V_SCALES, PTX)
                    maxima, totals, sums = _packed_half(
                        held, query, factors, offsets, maxima, totals, sums,
                        D, TILES, K_ELEMENTS, K_SCALES, V_ELEMENTS, V_SCALES, PTX,
                    )  # fmt: skip
                    k = memory + k_after * UNIT_WORDS
                    v = memory + v_after * UNIT_WORDS
                    held = _load_half(k, v, (p == last).to(tl.int32), lane, D, K_SCALES, V_SCALES, PTX)
                    maxima, totals, sums = _packed_half(
                        ahead, query, factors, offsets, maxima, totals, sums,
                        D, TILES, K_ELEMENTS, K_SCALES, V_ELEMENTS, V_SCALES, PTX,
                    )  # fmt: skip
            if stop > packed:
                if V_FACTOR != 1.0:
                    scaled = ()
                    for i in tl.static_range(4 * GROUPS * TILES):
                        scaled = scaled + (sums[i] * V_FACTOR,)
                    sums = scaled
                plain_query = _query(QBF, lane, row, head, columns, KV, G, D, QUERIES, TILES)
                written = length + more
                for p in range(tl.maximum(page, packed), stop):
                    kp = memory + tl.load(ktable + p).to(tl.int64) * UNIT_WORDS
                    vp = memory + tl.load(vtable + p).to(tl.int64) * UNIT_WORDS
                    for half in tl.static_range(2):
                        scores = _plain_scores(kp, half, lane, plain_query, D, TILES, PTX)
                        token = p * 32 + half * 16 + lane // 4
                        scores = _seen(scores, token, length, lane, written, scale, G, QUERIES, TILES)
                        weights, maxima, totals, sums = _weights(
                            scores, 1.0, 1.0, maxima, totals, sums, GROUPS, TILES, POWERS, PTX
                        )
                        left = written - p * 32 - half * 16
                        sums = _plain_values(vp, half, lane, left, weights, sums, D, TILES, PTX)
            factor = tl.where(stop > packed, 1.0, V_FACTOR)
            masses = ()
            for i in tl.static_range(2 * TILES):
                masses = masses + (sum_over_rows(totals[i], PTX),)
            if stop - page == pages:
                for tile in tl.static_range(TILES):
                    column = 8 * tile + 2 * (lane % 4)
                    to = OUT + _place(column, row, head, KV, G, QUERIES) * D + lane // 4
                    after = OUT + _place(column + 1, row, head, KV, G, QUERIES) * D + lane // 4
                    f0, f1 = factor / masses[2 * tile], factor / masses[2 * tile + 1]
                    _store(to, after, column, columns, sums, tile, f0, f1, GROUPS, TILES)
            else:
                part = 2 * program + (page == 0).to(tl.int32)
                for tile in tl.static_range(TILES):
                    column = 8 * tile + 2 * (lane % 4)
                    kept = PART + (part * COLUMNS + column) * D + lane // 4
                    _store(kept, kept + D, column, columns, sums, tile, factor, factor, GROUPS, TILES)
                    line = PART_ML + part * (16 * TILES) + column
                    tl.store(line, maxima[2 * tile], mask=lane < 4)
                    tl.store(line + 1, maxima[2 * tile + 1], mask=lane < 4)
                    tl.store(line + 8 * TILES, masses[2 * tile], mask=lane < 4)
                    tl.store(line + 8 * TILES + 1, masses[2 * tile + 1], mask=lane < 4)
                if FOLD > 1:
                    pair = row * KV + head
                    begin = tl.load(SHARED + pair)
                    others = tl.load(SHARED + pairs + pair) - begin
                    if others < FOLD:
                        # All lanes have written before one of them says so, and none reads before it knows.
                        tl.debug_barrier()
                        done = tl.atomic_add(DONE + pair, 1, sem="acq_rel", scope="gpu")
                        tl.debug_barrier()
                        if done == others:
                            tl.store(DONE + pair, 0)  # For the next launch.
                            _fold(OUT, PART, PART_ML, begin, begin + others, row, head, columns, KV, G, D, QUERIES)
            unit += stop - page
            if unit == (first + pages) * KV:
                row += 1
        else:
            row += 1


@triton.jit
def merge(
    SHARED,  # int32 [2, rows, KV]: the first and the last program of a pair
    MORE,
    OUT,
    PART,
    PART_ML,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    FOLD: tl.constexpr,
    PARTS: tl.constexpr,  # looked at together
    CHANNELS: tl.constexpr,  # of a program
    PTX: tl.constexpr,
):
    """Some channels of one (row, head) of the output, if several programs of `attend` left it to this one."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = head % G
    pair = row * KV + head // G
    if QUERIES > 1:
        before = tl.maximum(-tl.load(MORE + row), 0)
        column += before * G
        pair -= before * KV
    begin = tl.load(SHARED + pair)
    last = tl.load(SHARED + tl.num_programs(0) * KV + pair)
    if PTX:
        gdc_launch_dependents()
        gdc_wait()
    if last - begin >= FOLD:
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        only = column + tl.arange(0, 1)
        result = _merged(PART, PART_ML, begin, last, only, only >= 0, channel, D, QUERIES * G, PARTS)
        result = tl.reshape(result, (CHANNELS,))
        tl.store(OUT + (row * KV * G + head) * D + channel, result.to(OUT.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "programs", "least", "kind"])
def number_pages(
    LENGTH,
    MORE,
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
    more = tl.load(MORE + line, mask=line < rows, other=0)
    mine = tl.load(KIND + line, mask=line < rows, other=-1) == kind
    pages = tl.where(mine & (more >= 0), tl.cdiv(length + more, 32), 0)
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
