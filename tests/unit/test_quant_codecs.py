"""The torch codecs hold to the format's numpy codecs, bit for bit, whatever the values, shape, dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hma_serve import kvblock, quant
from hma_serve.kvblock.codecs.fp8 import Fp8
from hma_serve.quant.fp8 import Fp8 as TorchFp8
from hma_serve.v1.kv_block_pb2 import (
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
    KvRounding,
)
from support.kv_streams import GOLDEN, golden_values

VENDOR = {
    key: array
    for file in ("bfp8_vectors.npz", "bfp4_bfp2_vectors.npz")
    for key, array in np.load(GOLDEN / "tenstorrent" / file, allow_pickle=False).items()
}
VENDOR_CASES = sorted(int(name[1:-5]) for name in VENDOR if name.endswith("_bits"))
ROUNDINGS: list[tuple[quant.Rounding, KvRounding.ValueType]] = [
    ("nearest_even", KV_ROUNDING_NEAREST_EVEN),
    ("nearest_away", KV_ROUNDING_NEAREST_AWAY),
]
SHAPE = (3, 64, 96)


def hard_values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(sum(kind.encode()))
    normal = rng.standard_normal(SHAPE).astype(np.float32)
    if kind == "wide":
        return (normal * 2.0 ** rng.integers(-145, 120, SHAPE)).astype(np.float32)
    if kind == "smallest":  # groups around exponents 0 to 12, subnormals among them
        return (normal * 2.0 ** rng.integers(-128, -113, (3, 64, 6)).repeat(16, -1)).astype(np.float32)
    if kind == "ties":
        return (rng.integers(-255, 256, SHAPE) / 128).astype(np.float32)
    if kind == "zeros":
        return np.where(rng.random(SHAPE) < 0.95, np.float32(-0.0), normal)
    if kind == "saturating":
        return np.where(rng.random(SHAPE) < 0.5, np.nextafter(np.float32(2), np.float32(0)), -normal)
    if kind == "bits":
        drawn = rng.integers(0, 2**32, SHAPE, dtype=np.uint32)
        return np.where((drawn >> 23 & 255) >= 254, 0, drawn).astype(np.uint32).view(np.float32)
    return normal


KINDS = ["normal", "wide", "smallest", "ties", "zeros", "saturating", "bits"]


@pytest.mark.parametrize("case", VENDOR_CASES)
def test_block_float_is_bit_for_bit_the_vendors(case: int) -> None:
    rows, columns = (int(n) for n in VENDOR[f"c{case}_shape"])
    codec = quant.codec(f"tt_bfp{VENDOR[f'c{case}_bits']}_b")
    values = torch.from_numpy(VENDOR[f"c{case}_input"]).view(rows, columns)
    right = torch.from_numpy(VENDOR[f"c{case}_packed"])
    for dtype in (torch.float32, torch.bfloat16):
        packed = codec.encode(values.to(dtype))
        assert packed.shape == (rows // 32, codec.group_bytes(columns))
        assert torch.equal(packed.flatten(), right)
        decoded = codec.decode(packed, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded.float().flatten(), torch.from_numpy(VENDOR[f"c{case}_decoded"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quant.codec_names())
def test_every_codec_equals_the_formats(name: str, kind: str) -> None:
    values = hard_values(kind)
    if name.startswith("int4") and kind in ("wide", "bits"):
        values = np.clip(values, -6e4, 6e4)
    reference, codec = kvblock.codec(name), quant.codec(name)
    right = reference.encode(values)
    assert np.array_equal(codec.encode(torch.from_numpy(values)).numpy(), right)
    decoded = reference.decode(right, *SHAPE)
    packed = torch.from_numpy(right)
    _same_bits(codec.decode(packed).numpy(), decoded)
    assert torch.equal(codec.decode(packed, torch.bfloat16), torch.from_numpy(decoded).bfloat16())


def drawn_payload(name: str, seed: int) -> np.ndarray:
    """Units of 3 heads, 64 tokens and 96 channels with any codes that may travel, also those that no encoder writes."""
    rng, codec = np.random.default_rng(seed), kvblock.codec(name)
    units = rng.integers(0, 256, (3, 2, codec.group_bytes(96)), dtype=np.uint8)
    if name in ("f32", "bf16"):
        words = units.view("<u4" if name == "f32" else "<u2")
        beyond = words.dtype.type(0x7F7F8000 if name == "f32" else 0x7F80)
        words[words << 1 >> 1 >= beyond] = 0
        return units
    if name.startswith("tt_"):
        tiles = units.reshape(6, 3, -1)
        tiles[..., :64][tiles[..., :64] == 255] = 0
        bits, elements = int(name[6]), tiles[..., 64:]
        for shift in range(0, 8, bits):  # a sign without magnitude
            code = elements >> shift & ((1 << bits) - 1)
            elements[code == 1 << (bits - 1)] ^= np.uint8(1 << (shift + bits - 1))
        return units
    if "fp8" in name:
        elements = units[..., : 32 * 96]
        elements[...] = np.where((elements & 0x7F >= 0x78) | (elements == 0x80), 0x35, elements)
    if name.startswith("mx"):
        largest = {"mxfp8_e4m3": 246, "mxint8": 253, "mxfp4": 252}[name]
        units[..., -96:] = rng.integers(0, largest + 1, units[..., -96:].shape)
        return units
    if name.startswith("int4"):
        halves = units[..., -4 * 96 :].view("<f2")
        halves[...] = rng.standard_normal(halves.shape) * 2.0 ** rng.integers(-20, 10, halves.shape)
        halves[..., :96] = np.abs(halves[..., :96])
        return units
    if name == "nvfp4":
        units[..., 16 * 96 : -4] = rng.integers(0, 0x7F, units[..., 16 * 96 : -4].shape)
    scales = units[..., -(4 if "." in name or name == "nvfp4" else 128) :].view("<f4")
    scales[...] = 2.0 ** rng.uniform(-100, 100, scales.shape)
    return units


@pytest.mark.parametrize("name", quant.codec_names())
def test_codes_that_no_encoder_writes_are_read_alike(name: str) -> None:
    reference, codec = kvblock.codec(name), quant.codec(name)
    for seed in range(5):
        units = drawn_payload(name, seed)
        reference.check_payload(units, 3, 64, 96)
        decoded = reference.decode(units, 3, 64, 96)
        assert np.isfinite(decoded).all()
        assert torch.from_numpy(decoded).bfloat16().isfinite().all()
        _same_bits(codec.decode(torch.from_numpy(units)).numpy(), decoded)
        assert torch.equal(codec.decode(torch.from_numpy(units), torch.bfloat16), torch.from_numpy(decoded).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "rounding", "wire_rounding"),
    [
        ("tt_bfp8_b", "nearest_away", KV_ROUNDING_NEAREST_AWAY),
        ("tt_bfp4_b", "nearest_away", KV_ROUNDING_NEAREST_AWAY),
        ("tt_bfp4_b", "truncate", KV_ROUNDING_TRUNCATE),
        ("tt_bfp2_b", "nearest_away", KV_ROUNDING_NEAREST_AWAY),
    ],
)
def test_the_vendors_other_roundings_equal_the_formats(
    name: str, rounding: quant.Rounding, wire_rounding: KvRounding.ValueType, kind: str
) -> None:
    values = hard_values(kind)
    right = kvblock.codec(name).encode(values, wire_rounding)
    assert np.array_equal(quant.codec(name).encode(torch.from_numpy(values), rounding).numpy(), right)
    kvblock.codec(name).check_payload(right, *SHAPE)


@pytest.mark.parametrize("name", ["fp8_e4m3fn.head", "fp8_e4m3fnuz.tensor"])
def test_calibrated_scales_do_not_depend_on_what_is_packed_with_them(name: str) -> None:
    values = hard_values("normal")
    reference, codec = kvblock.codec(name), quant.codec(name)
    assert isinstance(reference, Fp8)
    assert isinstance(codec, TorchFp8)
    scale = np.array([0.5, 0.25, 0.125] if name.endswith("head") else [0.25], np.float32)
    whole = codec.encode(torch.from_numpy(values), scale=torch.from_numpy(scale))
    assert np.array_equal(whole.numpy(), reference.encode(values, scale=scale))
    part = codec.encode(torch.from_numpy(values[:, 32:]), scale=torch.from_numpy(scale))
    assert torch.equal(part, whole[:, 1:])


@pytest.mark.parametrize("name", quant.codec_names())
def test_both_packages_know_the_same_codecs(name: str) -> None:
    assert quant.codec_names() == kvblock.codec_names()
    for head_dim in (32, 64, 128, 256):
        assert quant.codec(name).group_bytes(head_dim) == kvblock.codec(name).group_bytes(head_dim)


@pytest.mark.parametrize(("rounding", "wire_rounding"), ROUNDINGS)
def test_golden_payload(rounding: quant.Rounding, wire_rounding: KvRounding.ValueType) -> None:
    packed = quant.codec("tt_bfp8_b").encode(torch.from_numpy(golden_values().copy()), rounding)
    assert packed.numpy().tobytes() == (GOLDEN / "kvblock" / f"tt_bfp8_b.{rounding}.bin").read_bytes()
    assert wire_rounding in (KV_ROUNDING_NEAREST_EVEN, KV_ROUNDING_NEAREST_AWAY)


@pytest.mark.parametrize("name", quant.codec_names())
def test_leading_axes_and_strides_do_not_matter(name: str) -> None:
    codec = quant.codec(name)
    values = torch.from_numpy(hard_values("normal"))
    packed = codec.encode(values)
    if not name.endswith(".tensor"):  # whose scale covers all heads that are packed together
        assert torch.equal(codec.encode(values[0]), packed[0])
    assert torch.equal(codec.encode(values[None]), packed[None])
    assert torch.equal(codec.encode(torch.stack([values, 2 * values]))[0], packed)
    transposed = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(codec.encode(transposed), packed)
    pool = torch.zeros((5, 7, 2, packed.shape[-1]), dtype=torch.uint8)
    pool[1:4, 3] = packed
    assert torch.equal(codec.decode(pool[1:4, 3]), codec.decode(packed))
    assert torch.equal(codec.decode(packed[1, 1:]), codec.decode(packed)[1, 32:])


@pytest.mark.parametrize("name", quant.codec_names())
def test_bytes_at_any_offset_of_a_message_are_read(name: str) -> None:
    codec = quant.codec(name)
    packed = codec.encode(torch.from_numpy(hard_values("normal")))
    for offset in (1, 2, 3, 5):
        message = bytearray(offset) + bytearray(packed.numpy().tobytes())
        raw = torch.frombuffer(message, dtype=torch.uint8)[offset:].view(packed.shape)
        assert torch.equal(codec.decode(raw), codec.decode(packed))


@pytest.mark.parametrize("name", quant.codec_names())
def test_nothing_packs_to_nothing(name: str) -> None:
    codec = quant.codec(name)
    packed = codec.encode(torch.zeros(2, 0, 64))
    assert packed.shape == (2, 0, codec.group_bytes(64))
    assert codec.decode(packed).shape == (2, 0, 64)


def test_inputs_are_left_alone() -> None:
    values = torch.from_numpy(hard_values("normal"))
    before = values.clone()
    for name in quant.codec_names():
        packed = quant.codec(name).encode(values)
        copy = packed.clone()
        quant.codec(name).decode(packed)
        assert torch.equal(packed, copy)
    quant.fake_quantize_bfp8(values)
    assert torch.equal(values, before)


def test_what_is_not_finite_becomes_codes_that_readers_refuse() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        values = torch.ones(1, 32, 32)
        values[0, 5, 20] = bad
        for name in quant.codec_names():
            payload = quant.codec(name).encode(values).numpy()
            with pytest.raises(kvblock.KvFormatError):
                kvblock.codec(name).check_payload(payload, 1, 32, 32)
        packed = quant.codec("tt_bfp8_b").encode(values)
        decoded = quant.codec("tt_bfp8_b").decode(packed)
        assert decoded[0, 5, 16:].isnan().all()
        assert decoded.isnan().sum() == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quant.codec_names())
def test_cuda_gives_the_same_bits(name: str, kind: str) -> None:
    codec = quant.codec(name)
    values = torch.from_numpy(hard_values(kind)).clamp(-6e4, 6e4)
    roundings: list[quant.Rounding] = ["nearest_even", "nearest_away"] if name.startswith("tt_") else ["nearest_even"]
    for rounding in roundings:
        packed = codec.encode(values, rounding)
        assert torch.equal(codec.encode(values.cuda(), rounding).cpu(), packed)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(codec.decode(packed.cuda(), dtype).cpu(), codec.decode(packed, dtype))
    fake = quant.fake_quantize_bfp8(values.cuda())
    assert torch.equal(fake.cpu(), quant.fake_quantize_bfp8(values))


def test_wrong_arguments_are_refused() -> None:
    bfp8, f32 = quant.codec("tt_bfp8_b"), quant.codec("f32")
    with pytest.raises(ValueError, match="no codec"):
        quant.codec("fp7")
    with pytest.raises(ValueError, match="whole groups"):
        bfp8.encode(torch.zeros(1, 31, 32))
    with pytest.raises(ValueError, match="multiple of 32 channels"):
        bfp8.encode(torch.zeros(1, 32, 48))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        bfp8.encode(torch.zeros(1, 32, 32, dtype=torch.float16))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        bfp8.decode(torch.zeros(1, 1, 1088, dtype=torch.uint8), torch.float16)
    with pytest.raises(ValueError, match="no units of 1087"):
        bfp8.decode(torch.zeros(1, 1, 1087, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no units of 129"):
        f32.decode(torch.zeros(1, 1, 129, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rounds to nearest even"):
        f32.encode(torch.zeros(1, 32, 32), "nearest_away")
    with pytest.raises(ValueError, match="nearest_even or nearest_away"):
        bfp8.encode(torch.zeros(1, 32, 32), "up")  # type: ignore[arg-type]


def _same_bits(found: np.ndarray, right: np.ndarray) -> None:
    assert np.array_equal(found.view(np.uint32), right.view(np.uint32))
