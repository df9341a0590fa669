"""The numpy codecs: vendor vectors, the worked example, every code point, bans."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import (
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
    KV_SECTION_KIND_ELEMENTS,
    KvCodecId,
    KvCodecSpec,
    KvRounding,
)
from support.kv_streams import GOLDEN

VENDOR = {
    key: array
    for file in ("bfp8_vectors.npz", "bfp4_bfp2_vectors.npz")
    for key, array in np.load(GOLDEN / "tenstorrent" / file, allow_pickle=False).items()
}
VENDOR_CASES = sorted(int(name[1:-5]) for name in VENDOR if name.endswith("_bits"))
EXAMPLE = [1, -1, 0.5, 1.9921875, 64.5 / 64, 65.5 / 64, 1 / 64, 1 / 128, 3 / 128, 0, -0.0, 1 / 256, -3 / 128, 1.984375]
EXAMPLE += [3 / 256, -1.9921875]
TT = kvblock.codec("tt_bfp8_b")


@pytest.mark.parametrize("case", VENDOR_CASES)
def test_block_float_is_bit_for_bit_the_vendors(case: int) -> None:
    codec = kvblock.codec(f"tt_bfp{VENDOR[f'c{case}_bits']}_b")
    rows, columns = (int(n) for n in VENDOR[f"c{case}_shape"])
    values = VENDOR[f"c{case}_input"].reshape(1, rows, columns)
    packed = VENDOR[f"c{case}_packed"]
    assert np.array_equal(codec.encode(values).reshape(-1), packed)
    assert np.array_equal(codec.decode(packed, 1, rows, columns).reshape(-1), VENDOR[f"c{case}_decoded"])
    codec.check_payload(packed, 1, rows, columns)


def test_every_case_of_the_vendor_is_there() -> None:
    assert len(VENDOR_CASES) == 24
    assert {int(VENDOR[f"c{case}_bits"]) for case in VENDOR_CASES} == {8, 4, 2}


@pytest.mark.parametrize(
    ("rounding", "row"),
    [
        (KV_ROUNDING_NEAREST_EVEN, "40c0207f4042010002000000827f01ff"),
        (KV_ROUNDING_NEAREST_AWAY, "40c0207f4142010102000000827f01ff"),
    ],
)
def test_worked_example(rounding: KvRounding.ValueType, row: str) -> None:
    values = np.zeros((1, 32, 32), dtype=np.float32)
    values[0, 0, :16] = EXAMPLE
    unit = TT.encode(values, rounding).tobytes()
    assert unit[0] == 127
    assert unit[1:64] == bytes(63)
    assert unit[64:80].hex() == row
    assert unit[80:] == bytes(1088 - 80)


def test_bfp8_places_every_element_where_the_page_says() -> None:
    tokens, channels = np.meshgrid(np.arange(64), np.arange(96), indexing="ij")
    unit_of = tokens // 32 * 3 + channels // 32
    face = tokens % 32 // 16 * 2 + channels % 32 // 16
    exponent_at = unit_of * 1088 + face * 16 + tokens % 16
    element_at = unit_of * 1088 + 64 + face * 256 + tokens % 16 * 16 + channels % 16
    rng = np.random.default_rng(1)
    payload = rng.integers(0, 255, 6 * 1088, dtype=np.uint8)
    element = payload[element_at].astype(np.int64)
    exponent = payload[exponent_at].astype(np.int64)
    sign = np.where(element < 128, 1.0, -1.0)
    right = np.where(exponent < 7, 0.0, sign * (element & 127) * 2.0 ** (exponent - 133))
    assert np.array_equal(TT.decode(payload, 1, 64, 96)[0], right.astype(np.float32))


def test_bfp8_decodes_every_code_at_every_exponent() -> None:
    exponents = np.arange(255)
    tiles = np.empty((255, 1088), dtype=np.uint8)
    tiles[:, :64] = exponents[:, None]
    tiles[:, 64:] = np.tile(np.arange(256), 4)
    codes = np.arange(256)
    steps = np.where(exponents >= 7, 2.0 ** (exponents - 133), 0.0)
    right = np.where(codes < 128, codes, 128 - codes) * steps[:, None]
    face = TT.decode(tiles, 255, 32, 32)[:, :16, :16].reshape(255, 256)
    assert np.array_equal(face, right.astype(np.float32))
    assert np.array_equal(face, face.astype(ml_dtypes.bfloat16).astype(np.float32))


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (1, 32, 32), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.sampled_from([KV_ROUNDING_NEAREST_EVEN, KV_ROUNDING_NEAREST_AWAY]),
)
def test_bfp8_error_is_half_a_step_or_saturation(values: np.ndarray, rounding: KvRounding.ValueType) -> None:
    unit = TT.encode(values, rounding)
    TT.check_payload(unit, 1, 32, 32)
    decoded = TT.decode(unit, 1, 32, 32).astype(np.float64)
    groups = values.reshape(32, 2, 16)
    exponent = (groups.view(np.uint32) >> 23 & 255).max(-1, keepdims=True).astype(np.int64)
    step = np.where(exponent >= 7, 2.0 ** (exponent - 133), 2.0**-119)  # below 7 all of it is lost
    error = np.abs(decoded.reshape(32, 2, 16) - groups)
    assert (error <= np.where(np.abs(groups) > 126.5 * step, step, step / 2)).all()


def test_bfp8_saturates_instead_of_raising_the_exponent() -> None:
    values = np.full((1, 32, 32), np.nextafter(np.float32(2), np.float32(0)), dtype=np.float32)
    unit = TT.encode(values)
    assert set(unit.reshape(-1)[:64]) == {127}
    assert set(unit.reshape(-1)[64:]) == {127}


def test_bfp8_never_writes_a_negative_zero() -> None:
    values = np.full((1, 32, 32), -1e-9, dtype=np.float32)
    values[..., 0::16] = 1.0
    values[..., 1::16] = -0.0
    values[..., 2::16] = -(2.0**-140)
    TT.check_payload(TT.encode(values), 1, 32, 32)


def test_bf16_decodes_every_code_as_ml_dtypes() -> None:
    codes = np.arange(65536, dtype="<u2")
    ours = kvblock.codec("bf16").decode(codes.view(np.uint8), 1, 64, 1024).reshape(-1)
    theirs = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_bf16_rounds_as_ml_dtypes() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    values = np.where((bits >> 23 & 255) >= 254, 0, bits).astype(np.uint32).view(np.float32).reshape(2, 64, 512)
    ours = kvblock.codec("bf16").encode(values).reshape(-1).view("<u2")
    assert np.array_equal(ours, values.astype(ml_dtypes.bfloat16).reshape(-1).view("<u2"))


def test_f32_is_exact_in_token_order() -> None:
    values = np.random.default_rng(4).standard_normal((3, 64, 5)).astype(np.float32)
    packed = kvblock.codec("f32").encode(values)
    assert packed.tobytes() == values.tobytes()
    assert np.array_equal(kvblock.codec("f32").decode(packed, 3, 64, 5), values)


BITS = {
    "f32": 32,
    "bf16": 16,
    "tt_bfp8_b": 8.5,
    "tt_bfp4_b": 4.5,
    "tt_bfp2_b": 2.5,
    "fp8_e4m3fn": 8.25,
    "fp8_e4m3fnuz": 8.25,
    "fp8_e4m3_ieee": 8.25,
    "mxfp8_e4m3": 8.25,
    "mxint8": 8.25,
    "mxfp4": 4.25,
    "nvfp4": 4.5 + 32 / 4096,
    "int8": 8.25,
    "int4": 5,
    "int4.channel": 5,
}


@pytest.mark.parametrize("name", kvblock.codec_names())
def test_bits_per_element(name: str) -> None:
    bits = BITS.get(name, 8 + 32 / 4096)  # one scale per unit
    assert kvblock.codec(name).group_bytes(128) * 8 == bits * 32 * 128


@pytest.mark.parametrize(("name", "group_bytes"), [("f32", 32 * 128 * 4), ("bf16", 32 * 128 * 2), ("tt_bfp8_b", 4352)])
def test_sizes(name: str, group_bytes: int) -> None:
    codec = kvblock.codec(name)
    assert codec.group_bytes(128) == group_bytes
    assert codec.payload_bytes(8, 96, 128) == 8 * 3 * group_bytes
    assert codec.payload_sections(8, 96, 128) == ((KV_SECTION_KIND_ELEMENTS, 0, 8 * 3 * group_bytes),)


@pytest.mark.parametrize("name", kvblock.codec_names())
@pytest.mark.parametrize("at", [0, 17, -1])
def test_any_alignment_is_read(name: str, at: int) -> None:
    codec = kvblock.codec(name)
    values = np.random.default_rng(5).standard_normal((2, 32, 64)).astype(np.float32)
    payload = codec.encode(values).tobytes()
    shifted = memoryview(b"\xff" * (at % 8) + payload)[at % 8 :]
    codec.check_payload(shifted, 2, 32, 64)
    assert np.array_equal(codec.decode(shifted, 2, 32, 64), codec.decode(payload, 2, 32, 64))


@pytest.mark.parametrize(
    ("name", "at", "byte"),
    [
        ("f32", 3, 0x7F),  # with 0x80 before it: exponent 255
        ("f32", -1, 0xFF),
        ("bf16", 1, 0x7F),
        ("bf16", -1, 0xFF),
        ("tt_bfp8_b", 0, 255),
        ("tt_bfp8_b", 63, 255),
        ("tt_bfp8_b", 1088 + 5, 255),
        ("tt_bfp8_b", 64, 0x80),
        ("tt_bfp8_b", -1, 0x80),
        ("tt_bfp4_b", 63, 255),
        ("tt_bfp4_b", 64, 0x80),
        ("tt_bfp4_b", -1, 0x08),
        ("tt_bfp2_b", 320, 255),
        ("tt_bfp2_b", 64, 0x02),
        ("tt_bfp2_b", 65, 0x08),
        ("tt_bfp2_b", 66, 0x20),
        ("tt_bfp2_b", -1, 0x80),
        ("fp8_e4m3fn", 0, 0x7F),
        ("fp8_e4m3fn", 2047, 0xFF),
        ("fp8_e4m3fn", -1, 0x80),  # a negative scale
        ("fp8_e4m3fn", -1, 0x7B),  # one of 6.6e35, which 448 lifts above the largest BF16
        ("fp8_e4m3fn.head", 100, 0x7F),
        ("fp8_e4m3fn.head", -1, 0xFF),
        ("fp8_e4m3fn.tensor", 2047, 0xFF),
        ("fp8_e4m3fn.tensor", -1, 0x7F),
        ("fp8_e4m3fnuz", 0, 0x80),
        ("fp8_e4m3fnuz.head", 2047, 0x80),
        ("fp8_e4m3fnuz.tensor", -1, 0x80),
        ("fp8_e4m3_ieee", 0, 0x78),
        ("fp8_e4m3_ieee.head", 2047, 0xF9),
        ("fp8_e4m3_ieee.tensor", 1, 0x7F),
        ("mxfp8_e4m3", 0, 0x7F),
        ("mxfp8_e4m3", 2047, 0xFF),
        ("mxfp8_e4m3", 2048, 255),
        ("mxfp8_e4m3", -1, 247),
        ("mxint8", -1, 254),
        ("mxfp4", 1024, 253),
        ("nvfp4", 1024, 0x7F),
        ("nvfp4", 1024 + 127, 0x80),
        ("nvfp4", -1, 0x80),
        ("nvfp4", -1, 0x7A),
        ("int8", -1, 0x7F),
        ("int4", 1024 + 1, 0x7C),
        ("int4", 1024 + 1, 0x80),
        ("int4", -1, 0xFC),
        ("int4.channel", 1024 + 127, 0x7E),
        ("int4.channel", 1024 + 129, 0x7D),
    ],
)
def test_banned_codes_are_found_wherever_they_stand(name: str, at: int, byte: int) -> None:
    codec = kvblock.codec(name)
    payload = codec.encode(np.ones((1, 32, 64), dtype=np.float32)).reshape(-1).copy()
    codec.check_payload(payload, 1, 32, 64)
    payload[at] = byte
    if name in ("f32", "bf16"):
        payload[at - 1] = 0x80
    with pytest.raises(errors.BannedCode) as refused:
        codec.check_payload(payload, 1, 32, 64)
    assert refused.value.field == "payload"


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_what_bf16_would_make_inf_is_banned_in_f32(sign: int) -> None:
    codec = kvblock.codec("f32")
    words = np.full(32, 0x7F7F7FFF | sign, dtype="<u4")  # rounds down to the largest BF16
    assert np.isfinite(words.view("<f4").astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    codec.check_payload(words.view(np.uint8), 1, 32, 1)
    words[31] += 1
    assert np.isinf(words.view("<f4").astype(ml_dtypes.bfloat16).astype(np.float32)).any()
    with pytest.raises(errors.BannedCode):
        codec.check_payload(words.view(np.uint8), 1, 32, 1)
    with pytest.raises(ValueError, match="too large"):
        codec.encode(words.view("<f4").reshape(1, 32, 1))


# Scales of a power of two step over the largest exponent; halves end at 65504.
LARGEST = {"mxint8": -1.6e38, "int4": -6e4, "int4.channel": -6e4}


@pytest.mark.parametrize("name", kvblock.codec_names())
def test_largest_values_are_not_banned(name: str) -> None:
    codec = kvblock.codec(name)
    values = np.full((1, 32, 32), LARGEST.get(name, -3.3e38), dtype=np.float32)
    values[..., ::2] *= -1
    codec.check_payload(codec.encode(values), 1, 32, 32)


@pytest.mark.parametrize("name", kvblock.codec_names())
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_encoders_refuse_what_cannot_travel(name: str, bad: float) -> None:
    values = np.zeros((1, 32, 32), dtype=np.float32)
    values[0, 31, 31] = bad
    with pytest.raises(ValueError, match="Inf and NaN"):
        kvblock.codec(name).encode(values)


def test_encoders_refuse_partial_groups_overflow_and_foreign_roundings() -> None:
    with pytest.raises(ValueError, match="whole groups"):
        TT.encode(np.zeros((1, 31, 32), dtype=np.float32))
    with pytest.raises(ValueError, match="too large"):
        kvblock.codec("bf16").encode(np.full((1, 32, 1), np.finfo(np.float32).max, dtype=np.float32))
    for name in LARGEST:
        with pytest.raises(ValueError, match="too large"):
            kvblock.codec(name).encode(np.full((1, 32, 32), 3.3e38, dtype=np.float32))
    for name in kvblock.codec_names():
        if name in ("f32", "tt_bfp4_b"):
            continue
        with pytest.raises(ValueError, match="rounds to nearest"):
            kvblock.codec(name).encode(np.zeros((1, 32, 32), dtype=np.float32), KV_ROUNDING_TRUNCATE)


@pytest.mark.parametrize("name", kvblock.codec_names())
def test_payloads_of_the_wrong_size_are_refused(name: str) -> None:
    codec = kvblock.codec(name)
    payload = codec.encode(np.zeros((1, 32, 32), dtype=np.float32)).tobytes()
    with pytest.raises(errors.TruncatedPayload):
        codec.decode(payload[:-1], 1, 32, 32)
    with pytest.raises(errors.TrailingBytes):
        codec.check_payload(payload + b"\0", 1, 32, 32)


IN_GROUPS = ["tt_bfp8_b", "tt_bfp4_b", "tt_bfp2_b", "mxfp8_e4m3", "mxint8", "mxfp4", "nvfp4", "int4", "int4.channel"]


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [*((name, 0) for name in kvblock.codec_names()), *((name, 48) for name in IN_GROUPS)],
)
def test_head_dims_that_do_not_fit_are_refused(name: str, head_dim: int) -> None:
    with pytest.raises(errors.BadGeometry):
        kvblock.codec(name).check_geometry(head_dim)


def test_registry_knows_codecs_by_name_and_by_identity() -> None:
    for name in kvblock.codec_names():
        codec = kvblock.codec(name)
        assert kvblock.codec_for(codec.spec(KV_ROUNDING_TRUNCATE)) is codec
        assert KvCodecId.Name(codec.id) == f"KV_CODEC_ID_{name.partition('.')[0].upper()}"
    assert {codec.id for codec in map(kvblock.codec, kvblock.codec_names())} == set(KvCodecId.values()) - {0}
    assert kvblock.codec("fp8_e4m3fn.token_head") is kvblock.codec("fp8_e4m3fn")
    with pytest.raises(errors.UnknownCodec, match="tt_bfp8_b"):
        kvblock.codec("fp7")
    right = TT.spec()
    for wrong in (
        KvCodecSpec(id=right.id, version=2),
        KvCodecSpec(id=right.id, version=1, granularity=2),  # type: ignore[arg-type]
        KvCodecSpec(id=99, version=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.UnknownCodec):
            kvblock.codec_for(wrong)
