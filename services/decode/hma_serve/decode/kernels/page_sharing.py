"""How pages are shared among programs of `attend`, and how what they found of a shared pair becomes its output.

All pages of all rows and heads are numbered in one line (row, then KV head, then page), and every program takes an
equal stretch of it, give or take one: `number_pages`. A *pair* is a (row, KV head). A program whose stretch covers only
some of a pair's pages leaves a *part*: maxima, masses and weighted values. Parts of a pair are added by their
log-sum-exp: by `merge`, a launch behind `attend`, in float32, so that it adds no error but the output's own rounding
(`half_page` has that of both).

Two limits of `merge`: bytes, 2 KB a part of four heads of 128 channels, at most two parts a program: 8.7 MB, written to
L2 and read there, 2 us at the rate of HBM; operations, four a value, nothing beside it. In fact round trips bind it.
`number_pages` reads 12 bytes a row and compares every program with every row: 0.3 million comparisons, a few us, once a
step.

`attend` says what the tensors hold.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hma_serve.decode.kernels.half_page import NOTHING


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
    PARTS: tl.constexpr,  # looked at together
    CHANNELS: tl.constexpr,  # of a program
    PTX: tl.constexpr,
):
    """Some channels of one (row, head) of the output, if several programs of `attend` left it to this one.

    Few registers matter more than few round trips: a kernel behind this one begins when all of this has begun.
    """
    COLUMNS: tl.constexpr = QUERIES * G
    PADDED: tl.constexpr = (COLUMNS + 7) // 8 * 8
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
    if last > begin:
        line = tl.arange(0, PARTS)[:, None]
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        top = tl.full([1, 1], NOTHING, tl.float32)
        total = tl.zeros([1, 1], tl.float32)
        sums = tl.zeros([1, CHANNELS], tl.float32)
        for i in range(begin, last + 1, PARTS):
            program = i + line
            there = program <= last
            # Only the first of the pair's programs began it: its part is the one for that.
            part = 2 * program + (program == begin).to(tl.int32)
            masses = PART_ML + part * (2 * PADDED) + column
            m = tl.load(masses, mask=there, other=NOTHING)
            mass = tl.load(masses + PADDED, mask=there, other=0.0)
            o = tl.load(PART + (part * COLUMNS + column) * D + channel, mask=there, other=0.0)
            new = tl.maximum(top, tl.max(m, 0, keep_dims=True))
            old, now = tl.exp2(top - new), tl.exp2(m - new)
            total = total * old + tl.sum(mass * now, 0, keep_dims=True)
            sums = sums * old + tl.sum(o * now, 0, keep_dims=True)
            top = new
        tl.store(OUT + (row * KV * G + head) * D + channel, (sums / total).to(OUT.dtype.element_ty))


@triton.jit
def column_place(column, row, head, KV: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr):
    """Where a block's column stands among [rows, heads]: heads of its first token, then of the next."""
    if QUERIES == 1:
        place = (row * KV + head) * G + column
    else:
        place = ((row + column // G) * KV + head) * G + column % G
    return place
