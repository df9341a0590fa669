"""Grouped-query attention of a sequence's last tokens over its pages, packed and plain, at the rate of their bytes.

A program is one warp. The grid is fixed; what there is to do is read from device memory, so one captured graph serves
any lengths. A program walks over its stretch of pages (`page_sharing`), half a page at a time (`half_page`). If that
covers all pages of a (row, KV head) it writes the result; else it leaves a part.

Heads are the eight columns of a product, so one pass over the bytes serves up to eight query heads at the same cost.
Several query tokens of a sequence form a *block*: rows that follow one another and are read together. A column is then
a head of a token, and there are as many *tiles* of eight columns as that takes. Packed tokens are older than any that
asks, so only plain ones are masked, column by column.

Two limits: the bytes of all pages, and instructions, of which there are half as many as fit into the time of the bytes
(`half_page` has both, and the error).

Packed pages do not change while a step runs, nor do lengths and tables, so a program finds its place and begins to load
before the kernel in front of it, which writes queries and the step's own tokens, is over: half a page into registers,
the other half and the first plain page into L2, where that kernel's stores arrive, too. The assembler moves loads
behind a wait unless there is a branch between.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hma_serve.decode.kernels.half_page import (
    CODES,
    E4M3,
    HALF_OF_120,
    INTEGERS,
    NOTHING,
    POWERS,
    TOKENS,
    filled,
    load_half,
    no_half,
    packed_half,
    plain_half,
)
from hma_serve.decode.kernels.page_sharing import column_place
from hma_serve.decode.kernels.warp import multiply_bf16, sum_over_rows, to_l2

_HALF_OF_120_BF16 = tl.constexpr(0x5D805D80)
UNIT_WORDS = tl.constexpr(4)
"""Words of an address's unit of 16 bytes."""


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
    MORE,  # int32 [rows]: see `StepRows`
    FIRST,  # int32 [rows + 1]: pages of all rows before
    BEGIN,  # int32 [programs + 1]: where a program's stretch begins
    ROW,  # int32 [programs]: the row of that
    OUT,  # [rows, heads, D]
    PART,  # fp32 [2 * programs, QUERIES * G, D]
    PART_ML,  # fp32 [2 * programs, 2, 8 * tiles]
    scale,  # of scores, times log2(e)
    table_stride,
    head_words,  # from head to head
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,  # query tokens of a block at most
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
    K_FACTOR: tl.constexpr = HALF_OF_120 if K_ELEMENTS == E4M3 else K_INTEGER
    V_FACTOR: tl.constexpr = HALF_OF_120 if V_ELEMENTS == E4M3 else V_INTEGER
    K_SCALE_BYTES: tl.constexpr = 128 if K_SCALES == TOKENS else 2 * D
    V_SCALE_BYTES: tl.constexpr = 128 if V_SCALES == TOKENS else 2 * D
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
            held = no_half(D, K_SCALES, V_SCALES)
            if page < packed:
                held = load_half(k, v, 0, lane, D, K_SCALES, V_SCALES, PTX)
                if PTX:
                    # No registers are left for more, so that goes as far as L2.
                    to_l2(k + 4 * D, 16 * D + K_SCALE_BYTES, lane)
                    to_l2(v + 4 * D, 16 * D + V_SCALE_BYTES, lane)
            if PTX:
                if stop > packed:
                    plain = tl.maximum(page, packed)
                    to_l2(memory + tl.load(ktable + plain).to(tl.int64) * UNIT_WORDS, 64 * D, lane)
                    to_l2(memory + tl.load(vtable + plain).to(tl.int64) * UNIT_WORDS, 64 * D, lane)
                gdc_wait()
                gdc_launch_dependents()
            columns = (more + 1) * G
            factors = filled(scale * K_FACTOR, 2 * TILES)
            if K_ELEMENTS == INTEGERS:
                query = _query(Q16, lane, row, head, columns, KV, G, D, QUERIES, TILES)
                factors = _of_columns(QSCALE, lane, row, head, columns, scale * K_FACTOR, KV, G, QUERIES, TILES)
            else:
                query = _query(QBF, lane, row, head, columns, KV, G, D, QUERIES, TILES)
                query = _enlarged(query, 2 * GROUPS * TILES, PTX)
            offsets = filled(0.0, 2 * TILES)
            if OFFSET:
                offsets = _of_columns(QOFFSET, lane, row, head, columns, scale, KV, G, QUERIES, TILES)
            maxima = filled(NOTHING, 2 * TILES)
            totals = filled(0.0, 2 * TILES)
            sums = filled(0.0, 4 * GROUPS * TILES)
            last = tl.minimum(stop, packed) - 1
            if page <= last:
                for p in range(page, last + 1):
                    # Loaded one half ahead; behind the last page its own second half, which is in the cache.
                    after = tl.minimum(p + 1, last)
                    k_after = tl.load(ktable + after).to(tl.int64)
                    v_after = tl.load(vtable + after).to(tl.int64)
                    ahead = load_half(k, v, 1, lane, D, K_SCALES, V_SCALES, PTX)
                    maxima, totals, sums = packed_half(
                        held, query, factors, offsets, maxima, totals, sums,
                        D, TILES, K_ELEMENTS, K_SCALES, V_ELEMENTS, V_SCALES, PTX,
                    )  # fmt: skip
                    k = memory + k_after * UNIT_WORDS
                    v = memory + v_after * UNIT_WORDS
                    held = load_half(k, v, (p == last).to(tl.int32), lane, D, K_SCALES, V_SCALES, PTX)
                    maxima, totals, sums = packed_half(
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
                        maxima, totals, sums = plain_half(
                            kp, vp, p, half, lane, plain_query, length, written, scale, maxima, totals, sums,
                            G, D, QUERIES, TILES, PTX,
                        )  # fmt: skip
            factor = tl.where(stop > packed, 1.0, V_FACTOR)
            masses = ()
            for i in tl.static_range(2 * TILES):
                masses = masses + (sum_over_rows(totals[i], PTX),)
            if stop - page == pages:
                for tile in tl.static_range(TILES):
                    column = 8 * tile + 2 * (lane % 4)
                    to = OUT + column_place(column, row, head, KV, G, QUERIES) * D + lane // 4
                    after = OUT + column_place(column + 1, row, head, KV, G, QUERIES) * D + lane // 4
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
            unit += stop - page
            if unit == (first + pages) * KV:
                row += 1
        else:
            row += 1


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
            pointers = QUERY + column_place(column, row, head, KV, G, QUERIES) * (D // 2) + lane % 4 + group * 8
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
        place = VALUES + column_place(column, row, head, KV, G, QUERIES)
        after = VALUES + column_place(column + 1, row, head, KV, G, QUERIES)
        values = values + (
            tl.load(place, mask=column < columns, other=0.0) * scale,
            tl.load(after, mask=column + 1 < columns, other=0.0) * scale,
        )
    return values


@triton.jit
def _enlarged(query, COUNT: tl.constexpr, PTX: tl.constexpr):
    """The query's registers times 2^60."""
    factor = tl.full([32], _HALF_OF_120_BF16, tl.int32)
    registers = ()
    for i in tl.static_range(COUNT):
        registers = registers + (multiply_bf16(query[i], factor, PTX),)
    return registers


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
