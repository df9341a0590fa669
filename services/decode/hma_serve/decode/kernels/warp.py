"""One warp, written out: what a lane loads, converts and multiplies, for programs of 32 threads.

Every value is a tensor of 32 elements, one a lane, so that its layout is never in question and a tensor-core
instruction can be fed from registers that were filled by a load of 16 contiguous bytes: no shared memory, no barriers,
no layout conversion. A matrix lies in *fragments*, the registers of PTX's `mma.m16n8k16`. With g = lane // 4 and
t = lane % 4, and two 16-bit elements a register:

    A (16 x 16), 4 registers: (row g, columns 2t, 2t+1), (row g+8, the same), (row g, columns 2t+8, +9), (row g+8, ...)
    B (16 x 8), 2 registers:  (rows 2t, 2t+1, column g), (rows 2t+8, +9, column g)
    C (16 x 8), 4 floats:     (row g, columns 2t, 2t+1), (row g+8, the same)

Each function exists twice: as PTX, and as a *twin* of the same arithmetic in plain Triton, which runs in the
interpreter and proves the PTX on a GPU. BF16 stays in integer registers in the twins: the interpreter's BF16 is not to
be trusted.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)


@triton.jit
def load_1(pointers, PTX: tl.constexpr):
    """One int32 a lane; nobody may have loaded it in this kernel before it was written for the last time."""
    if PTX:
        value = tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        value = tl.load(pointers)
    return (value,)


@triton.jit
def load_2(pointers, PTX: tl.constexpr):
    """Two neighbouring int32 a lane, aligned to 8 bytes."""
    if PTX:
        a, b = tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointers],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = tl.load(pointers), tl.load(pointers + 1)
    return (a, b)


@triton.jit
def load_4(pointers, PTX: tl.constexpr):
    """Four neighbouring int32 a lane, aligned to 16 bytes, and not kept in L1."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointers],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3)
    return (a, b, c, d)


@triton.jit
def load_words(pointers, WORDS: tl.constexpr, PTX: tl.constexpr):
    """WORDS neighbouring int32 a lane: 1, 2, 4 or 8."""
    if WORDS == 1:
        words = load_1(pointers, PTX)
    elif WORDS == 2:
        words = load_2(pointers, PTX)
    elif WORDS == 4:
        words = load_4(pointers, PTX)
    else:
        words = load_4(pointers, PTX) + load_4(pointers + 4, PTX)
    return words


@triton.jit
def to_l2(pointer, size, lane):
    """Brings so many bytes, a multiple of 16, into L2; a hint, for a kernel in PTX alone."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.eq.s32 p, $3, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [pointer + lane * 0, size + lane * 0, lane],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _low_half(x):
    return (x << 16) >> 16


@triton.jit
def _pair(low, high):
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _bf16_bits(x):
    """The BF16 nearest to a float32, ties to even, in the low half."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _bf16_value(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _f16_value(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _f16_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def biased_to_f16(x, PTX: tl.constexpr):
    """Four bytes of 128 + i to two registers of FP16 i, exact: the byte under 0x64 is 1024 + byte."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, m;
            mov.b32 m, 0x64646464;
            mov.b32 c, 0xE480E480;
            prmt.b32 a, $2, m, 0x4140;
            prmt.b32 b, $2, m, 0x4342;
            add.f16x2 $0, a, c;
            add.f16x2 $1, b, c;
            }""",
            "=r,=r,r",
            [x],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = _pair(_f16_bits(((x & 0xFF) - 128).to(tl.float32)), _f16_bits((((x >> 8) & 0xFF) - 128).to(tl.float32)))
        high = _pair(
            _f16_bits((((x >> 16) & 0xFF) - 128).to(tl.float32)), _f16_bits((((x >> 24) & 0xFF) - 128).to(tl.float32))
        )
    return low, high


@triton.jit
def int8_to_bf16(x, PTX: tl.constexpr):
    """Four two's complement bytes to two registers of BF16, exact: (128 + low 7 bits) - (128, or 256 if negative)."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, m, n, one;
            mov.b32 m, 0x43434343;
            mov.b32 n, 0xC300C300;
            mov.b32 one, 0x3F803F80;
            prmt.b32 a, $2, m, 0x4140;
            prmt.b32 b, $2, m, 0x4342;
            lop3.b32 c, a, 0x00800080, n, 0xEA;
            lop3.b32 d, b, 0x00800080, n, 0xEA;
            and.b32 a, a, 0xFF7FFF7F;
            and.b32 b, b, 0xFF7FFF7F;
            fma.rn.bf16x2 $0, a, one, c;
            fma.rn.bf16x2 $1, b, one, d;
            }""",
            "=r,=r,r",
            [x],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = _pair(_bf16_bits(((x << 24) >> 24).to(tl.float32)), _bf16_bits(((x << 16) >> 24).to(tl.float32)))
        high = _pair(_bf16_bits(((x << 8) >> 24).to(tl.float32)), _bf16_bits((x >> 24).to(tl.float32)))
    return low, high


@triton.jit
def e4m3_to_bf16(x, PTX: tl.constexpr):
    """Four E4M3 codes to two registers of BF16 of their values times 2^-120, exact: only the bits move."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, z;
            mov.b32 z, 0;
            prmt.b32 a, $2, z, 0x1404;
            prmt.b32 b, $2, z, 0x3424;
            and.b32 c, a, 0x7F007F00;
            and.b32 d, b, 0x7F007F00;
            shr.u32 c, c, 4;
            shr.u32 d, d, 4;
            lop3.b32 $0, a, 0x80008000, c, 0xEA;
            lop3.b32 $1, b, 0x80008000, d, 0xEA;
            }""",
            "=r,=r,r",
            [x],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = _pair(_moved_e4m3(x), _moved_e4m3(x >> 8))
        high = _pair(_moved_e4m3(x >> 16), _moved_e4m3(x >> 24))
    return low, high


@triton.jit
def _moved_e4m3(code):
    return ((code & 0x80) << 8) | ((code & 0x7F) << 4)


@triton.jit
def power_of_two(x, BYTE: tl.constexpr):
    """Float32 2^(E - 127) of a biased exponent in one of four bytes; E = 0 gives 0."""
    if BYTE == 3:
        bits = x >> 1
    else:
        bits = x << (23 - 8 * BYTE)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale(x, BYTE: tl.constexpr):
    """Float32 of a positive E4M3 code in one of four bytes, times 2^-120, exact: only the bits move."""
    if BYTE == 3:
        bits = x >> 4
    else:
        bits = x << (20 - 8 * BYTE)
    return (bits & 0x07F00000).to(tl.float32, bitcast=True)


@triton.jit
def powers_of_two_bf16(x, HIGH: tl.constexpr, PTX: tl.constexpr):
    """BF16 2^(E - 127) of two of four bytes, the low or the high two, in one register."""
    if PTX:
        if HIGH:
            pair = tl.inline_asm_elementwise(
                "{ .reg .b32 a, z; mov.b32 z, 0; prmt.b32 a, $1, z, 0x4342; shl.b32 $0, a, 7; }",
                "=r,r",
                [x],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            pair = tl.inline_asm_elementwise(
                "{ .reg .b32 a, z; mov.b32 z, 0; prmt.b32 a, $1, z, 0x4140; shl.b32 $0, a, 7; }",
                "=r,r",
                [x],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        y = x >> 16 if HIGH else x
        pair = ((y & 0xFF) << 7) | ((y & 0xFF00) << 15)
    return pair


@triton.jit
def multiply_bf16(a, b, PTX: tl.constexpr):
    """Products of BF16 pairs, rounded once."""
    if PTX:
        product = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        product = _pair(
            _bf16_bits(_bf16_value(a) * _bf16_value(b)), _bf16_bits(_bf16_value(a >> 16) * _bf16_value(b >> 16))
        )
    return product


@triton.jit
def pack_bf16(low, high, PTX: tl.constexpr):
    """Two float32 to a register of BF16, nearest even."""
    if PTX:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = _pair(_bf16_bits(low), _bf16_bits(high))
    return pair


@triton.jit
def transpose(x, PTX: tl.constexpr):
    """An 8 x 8 matrix of 16-bit elements, (row g, columns 2t, 2t+1) a lane, to its transpose."""
    if PTX:
        turned = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        square = tl.trans(tl.reshape(tl.join(_low_half(x), x >> 16), (8, 8)))
        low, high = tl.split(tl.reshape(square, (32, 2)))
        turned = _pair(low, high)
    return turned


@triton.jit
def _matrix(low, high):
    """8 x 8 of the elements (row g, columns 2t and 2t+1)."""
    return tl.reshape(tl.join(low, high), (8, 8))


@triton.jit
def _product(a0, a2, b0, b1):
    """8 x 8 of A's rows 8 x 16 and B's 16 x 8, as C's lanes hold it."""
    c = tl.sum(a0[:, None, :] * b0[None, :, :], 2) + tl.sum(a2[:, None, :] * b1[None, :, :], 2)
    return tl.split(tl.reshape(c, (32, 2)))


@triton.jit
def mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX: tl.constexpr):
    """C + A x B of FP16, sums in float32."""
    if PTX:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        left = _matrix(_f16_value(b0), _f16_value(b0 >> 16))
        right = _matrix(_f16_value(b1), _f16_value(b1 >> 16))
        d0, d1 = _product(
            _matrix(_f16_value(a0), _f16_value(a0 >> 16)), _matrix(_f16_value(a2), _f16_value(a2 >> 16)), left, right
        )
        d2, d3 = _product(
            _matrix(_f16_value(a1), _f16_value(a1 >> 16)), _matrix(_f16_value(a3), _f16_value(a3 >> 16)), left, right
        )
        c0, c1, c2, c3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
    return c0, c1, c2, c3


@triton.jit
def _bf16_matrix(x):
    return _matrix(_bf16_value(x), _bf16_value(x >> 16))


@triton.jit
def mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX: tl.constexpr):
    """C + A x B of BF16, sums in float32."""
    if PTX:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        left, right = _bf16_matrix(b0), _bf16_matrix(b1)
        d0, d1 = _product(_bf16_matrix(a0), _bf16_matrix(a2), left, right)
        d2, d3 = _product(_bf16_matrix(a1), _bf16_matrix(a3), left, right)
        c0, c1, c2, c3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
    return c0, c1, c2, c3


@triton.jit
def max_over_rows(x, PTX: tl.constexpr):
    """The largest of the eight lanes that share t."""
    if PTX:
        largest = tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b;
            shfl.sync.bfly.b32 a, $1, 4, 0x1f, 0xffffffff;
            max.f32 a, a, $1;
            shfl.sync.bfly.b32 b, a, 8, 0x1f, 0xffffffff;
            max.f32 a, a, b;
            shfl.sync.bfly.b32 b, a, 16, 0x1f, 0xffffffff;
            max.f32 $0, a, b;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        largest = tl.max(tl.reshape(x, (8, 4)), 0)
        largest = tl.reshape(tl.broadcast_to(largest[None, :], (8, 4)), (32,))
    return largest


@triton.jit
def sum_over_rows(x, PTX: tl.constexpr):
    """The sum of the eight lanes that share t."""
    if PTX:
        total = tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b;
            shfl.sync.bfly.b32 a, $1, 4, 0x1f, 0xffffffff;
            add.f32 a, a, $1;
            shfl.sync.bfly.b32 b, a, 8, 0x1f, 0xffffffff;
            add.f32 a, a, b;
            shfl.sync.bfly.b32 b, a, 16, 0x1f, 0xffffffff;
            add.f32 $0, a, b;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        total = tl.sum(tl.reshape(x, (8, 4)), 0)
        total = tl.reshape(tl.broadcast_to(total[None, :], (8, 4)), (32,))
    return total
