"""Every code point of every element and scale type against `ml_dtypes`, and every codec's layout against the spec."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from hma_serve import kvblock
from hma_serve.kvblock.codecs.minifloat import E2M1, E4M3_IEEE, E4M3FN, E4M3FNUZ, MiniFloat
from hma_serve.kvblock.codecs.mx import E8M0
from hma_serve.v1.kv_block_pb2 import KV_ROUNDING_NEAREST_AWAY, KV_ROUNDING_NEAREST_EVEN, KV_ROUNDING_TRUNCATE

ORACLES = [
    (E4M3FN, ml_dtypes.float8_e4m3fn),
    (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (E4M3_IEEE, ml_dtypes.float8_e4m3),
    (E2M1, ml_dtypes.float4_e2m1fn),
]
ALL_BYTES = np.arange(256, dtype=np.uint8)
TOKENS, CHANNELS = np.meshgrid(np.arange(32), np.arange(64), indexing="ij")


@pytest.mark.parametrize(("element", "oracle"), ORACLES)
def test_every_code_means_what_ml_dtypes_says(element: MiniFloat, oracle: type) -> None:
    codes = np.arange(len(element.values), dtype=np.uint8)
    theirs = codes.view(oracle).astype(np.float32)
    assert np.array_equal(element.banned, ~np.isfinite(theirs))
    assert np.array_equal(element.values[~element.banned], theirs[~element.banned])
    assert np.array_equal(np.signbit(element.values[~element.banned]), np.signbit(theirs[~element.banned]))
    assert element.largest == np.nanmax(theirs[~element.banned])


@pytest.mark.parametrize("element", [E4M3FN, E4M3FNUZ, E4M3_IEEE])
def test_banned_codes_are_found_among_others(element: MiniFloat) -> None:
    allowed = ALL_BYTES[~element.banned]
    assert not element.has_banned(np.stack([allowed, allowed])[:, 1:])
    for code in ALL_BYTES:
        assert element.has_banned(np.append(allowed, code)) == element.banned[code]


@pytest.mark.parametrize(("element", "oracle"), ORACLES)
def test_rounding_is_that_of_ml_dtypes(element: MiniFloat, oracle: type) -> None:
    finite = np.unique(element.values[~element.banned])
    middles = (finite[:-1] + finite[1:]) / 2
    drawn = np.random.default_rng(1).standard_normal(20_000).astype(np.float32) * np.float32(element.largest / 3)
    values = np.concatenate(
        [finite, middles, np.nextafter(middles, 0), np.nextafter(middles, 999), drawn / 1000, drawn]
    )
    values = np.clip(values, -element.largest, element.largest).astype(np.float32)
    assert np.array_equal(element.encode(values), values.astype(oracle).view(np.uint8))


def test_values_beyond_the_largest_saturate() -> None:
    for element, _ in ORACLES:
        codes = element.encode(np.array([1e9, -1e9], np.float32))
        assert np.array_equal(element.values[codes], [element.largest, -element.largest])


def test_every_e8m0_scale_is_that_of_ml_dtypes() -> None:
    theirs = ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(E8M0, theirs, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in kvblock.codec_names() if name.startswith("fp8")])
def test_every_fp8_code_at_several_scales(name: str) -> None:
    codec = kvblock.codec(name)
    oracle = {
        "fp8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "fp8_e4m3_ieee": ml_dtypes.float8_e4m3,
    }[name.partition(".")[0]]
    scales = np.full(32, np.float32(0.3)) if "." in name else np.geomspace(1e-30, 1e30, 32).astype(np.float32)
    stored = scales[:1] if "." in name else scales
    payload = np.concatenate([np.tile(ALL_BYTES, 32), stored.astype("<f4").view(np.uint8)])
    right = np.tile(ALL_BYTES.view(oracle).astype(np.float32), (32, 1)) * scales[:, None]
    found = codec.decode(payload, 1, 32, 256)[0]
    finite = np.isfinite(right)
    assert np.array_equal(found[finite], right[finite])
    assert not np.isfinite(codec.decode(payload, 1, 32, 256)[0][~finite]).any() or name.startswith("fp8_e4m3_ieee")


def test_int8_and_mxint8_read_every_code() -> None:
    signed = ALL_BYTES.view(np.int8).astype(np.float32)
    payload = np.concatenate([np.tile(ALL_BYTES, 32), np.full(32, 0.125, "<f4").view(np.uint8)])
    assert np.array_equal(kvblock.codec("int8").decode(payload, 1, 32, 256)[0], np.tile(signed * 0.125, (32, 1)))
    payload = np.concatenate([np.tile(ALL_BYTES, 32), np.full(32 * 8, 130, np.uint8)])
    assert np.array_equal(kvblock.codec("mxint8").decode(payload, 1, 32, 256)[0], np.tile(signed / 64 * 8, (32, 1)))


def _every_nibble() -> np.ndarray:
    """32 x 64 nibbles, the sixteen codes over and over."""
    return np.tile((np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4).astype(np.uint8), 32 * 4)


def test_nvfp4_reads_every_code_under_every_scale() -> None:
    scales = np.resize(np.arange(0x7F, dtype=np.uint8), 128)
    payload = np.concatenate([_every_nibble(), scales, np.full(1, 0.25, "<f4").view(np.uint8)])
    kvblock.codec("nvfp4").check_payload(payload, 1, 32, 64)
    elements = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    right = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None] * elements * np.float32(0.25)
    assert np.array_equal(kvblock.codec("nvfp4").decode(payload, 1, 32, 64).reshape(-1, 16), right)


def test_mxfp4_reads_every_code_under_every_scale() -> None:
    codes = np.arange(256, dtype=np.uint8).clip(0, 252)
    units = np.concatenate([np.tile(_every_nibble(), (4, 1)), codes.reshape(4, 64)], axis=1)
    kvblock.codec("mxfp4").check_payload(units, 4, 32, 64)
    elements = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    right = scales[:, None] * np.tile(elements, 2)
    assert np.array_equal(kvblock.codec("mxfp4").decode(units, 4, 32, 64).reshape(-1, 32), right)


@pytest.mark.parametrize("name", ["int4", "int4.channel"])
def test_int4_reads_every_code(name: str) -> None:
    halves = np.concatenate([np.full(64, 0.5, "<f2"), np.full(64, -3.25, "<f2")])
    payload = np.concatenate([_every_nibble(), halves.view(np.uint8)])
    right = np.arange(16, dtype=np.uint8).view(ml_dtypes.uint4).astype(np.float32) * np.float32(0.5) - np.float32(3.25)
    assert np.array_equal(kvblock.codec(name).decode(payload, 1, 32, 64).reshape(-1, 16), np.tile(right, (128, 1)))


@pytest.mark.parametrize("bits", [4, 2])
def test_small_block_float_reads_every_code_at_every_exponent(bits: int) -> None:
    magnitude_bits = bits - 1
    codes = np.arange(1 << bits)
    row = np.resize(codes, 16)
    places = np.arange(0, 8, bits)
    packed = (row.reshape(-1, 8 // bits) << places).sum(-1).astype(np.uint8)
    tiles = np.empty((255, 64 + 128 * bits), dtype=np.uint8)
    tiles[:, :64] = np.arange(255)[:, None]
    tiles[:, 64:] = np.tile(packed, 64)
    exponents = np.arange(255)[:, None]
    steps = np.where(exponents >= magnitude_bits, 2.0 ** (exponents - 126 - magnitude_bits), 0.0)
    signed = np.where(row >> magnitude_bits, -1.0, 1.0) * (row & ((1 << magnitude_bits) - 1))
    found = kvblock.codec(f"tt_bfp{bits}_b").decode(tiles, 255, 32, 32)
    assert np.array_equal(found[:, 0, :16], (signed * steps).astype(np.float32))
    assert np.array_equal(found[:, 17, 16:], found[:, 0, :16])


def test_four_bit_roundings_on_ties_and_between() -> None:
    values = np.zeros((1, 32, 32), dtype=np.float32)
    # The largest fixes the step at 1/4: 2.5, 1.5 and 0.5 steps are ties; truncation cuts 2.9 to 2.
    values[0, 0, :6] = [1.0, 0.625, 0.375, 0.125, 2.9 / 4, -2.9 / 4]
    wanted = {
        KV_ROUNDING_NEAREST_EVEN: [4, 2, 2, 0, 3, 3 | 8],
        KV_ROUNDING_NEAREST_AWAY: [4, 3, 2, 1, 3, 3 | 8],
        KV_ROUNDING_TRUNCATE: [4, 2, 1, 0, 2, 2 | 8],
    }
    for rounding, codes in wanted.items():
        row = kvblock.codec("tt_bfp4_b").encode(values, rounding)[0, 0, 64:72]
        found = [int(byte) >> shift & 15 for byte in row for shift in (0, 4)][:6]
        assert found == codes


def _fields(name: str, unit: np.ndarray) -> np.ndarray:
    """One unit of 32 x 64 read element by element, by the formulas of docs/kv-block-format.md."""
    t, d = TOKENS, CHANNELS
    nibble = unit[(t * 64 + d) // 2 % len(unit)] >> (d % 2 * 4).astype(np.uint8) & 15
    e2m1 = ml_dtypes.float4_e2m1fn
    readers: dict[str, Callable[[], np.ndarray]] = {
        "fp8_e4m3fn": lambda: (
            unit[t * 64 + d].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit[2048:].copy().view("<f4")[t]
        ),
        "fp8_e4m3fn.tensor": lambda: (
            unit[t * 64 + d].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit[2048:].copy().view("<f4")[0]
        ),
        "int8": lambda: unit[t * 64 + d].view(np.int8).astype(np.float32) * unit[2048:].copy().view("<f4")[t],
        "mxfp8_e4m3": lambda: (
            unit[t * 64 + d].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * E8M0[unit[2048 + t * 2 + d // 32]]
        ),
        "mxint8": lambda: unit[t * 64 + d].view(np.int8).astype(np.float32) / 64 * E8M0[unit[2048 + t * 2 + d // 32]],
        "mxfp4": lambda: nibble.view(e2m1).astype(np.float32) * E8M0[unit[1024 + t * 2 + d // 32]],
        "nvfp4": lambda: (
            nibble.view(e2m1).astype(np.float32)
            * unit[1024 + t * 4 + d // 16].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            * unit[1152:].copy().view("<f4")[0]
        ),
        "int4": lambda: (
            nibble * unit[1024:1152].copy().view("<f2")[t * 2 + d // 32].astype(np.float32)
            + unit[1152:].copy().view("<f2")[t * 2 + d // 32].astype(np.float32)
        ),
        "int4.channel": lambda: (
            nibble * unit[1024:1152].copy().view("<f2")[d].astype(np.float32)
            + unit[1152:].copy().view("<f2")[d].astype(np.float32)
        ),
    }
    return readers[name]()


@pytest.mark.parametrize(
    "name",
    ["fp8_e4m3fn", "fp8_e4m3fn.tensor", "int8", "mxfp8_e4m3", "mxint8", "mxfp4", "nvfp4", "int4", "int4.channel"],
)
def test_elements_and_scales_stand_where_the_page_says(name: str) -> None:
    codec = kvblock.codec(name)
    values = np.random.default_rng(2).standard_normal((2, 64, 64)).astype(np.float32)
    values *= 2.0 ** np.random.default_rng(3).integers(-3, 4, (2, 64, 64)).astype(np.float32)
    units = codec.encode(values)
    decoded = codec.decode(units, 2, 64, 64)
    for head in range(2):
        for group in range(2):
            right = _fields(name, units[head, group]).astype(np.float32)
            assert np.array_equal(decoded[head, 32 * group : 32 * group + 32], right)


BOUNDS = {  # of the error, as a part of the largest magnitude that shares a scale with the element
    "tt_bfp8_b": 1 / 127,
    "tt_bfp4_b": 1 / 7,
    "tt_bfp2_b": 1.0,
    "mxint8": 1 / 64,
    "mxfp8_e4m3": 1 / 8,
    "int8": 1 / 254 + 1e-6,
    "int4": 2 / 30 + 2e-3,
    "int4.channel": 2 / 30 + 2e-3,
    "mxfp4": 1 / 4,
    "nvfp4": 1 / 4,
    "bf16": 2**-8,
    "f32": 0.0,
}


@pytest.mark.parametrize("name", kvblock.codec_names())
def test_error_is_bounded(name: str) -> None:
    values = np.random.default_rng(4).uniform(-1, 1, (2, 64, 64)).astype(np.float32)
    decoded = kvblock.codec(name).decode(kvblock.codec(name).encode(values), 2, 64, 64)
    assert np.abs(decoded - values).max() <= BOUNDS.get(name, 1 / 14)  # FP8: half of 2^-3
