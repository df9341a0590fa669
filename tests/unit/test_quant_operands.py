"""Operand formats against their definitions: ml_dtypes, the codecs, and arithmetic written out."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from hma_serve import quant


def drawn(rows: int = 64, features: int = 96, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    x[:, ::17] *= 40.0
    x[3] = 0.0
    x[5] *= 2.0**-60
    return x


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("fp8_e4m3fn", ml_dtypes.float8_e4m3fn, 448.0),
        ("fp8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 240.0),
        ("fp8_e4m3_ieee", ml_dtypes.float8_e4m3, 240.0),
    ],
)
def test_fp8_has_a_scale_per_row(name: str, dtype: type, largest: float) -> None:
    x = drawn()
    values, scale = quant.operand_format(name).quantize(x)
    assert scale is not None
    rows = x.numpy()
    expected_scale = np.maximum(np.abs(rows).max(1, keepdims=True) / np.float32(largest), np.float32(2.0**-126))
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    expected = (rows / expected_scale).clip(-largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize(
    ("name", "codec"), [("mxfp8_e4m3", "mxfp8_e4m3"), ("mxint8", "mxint8"), ("tt_bfp4", "tt_bfp4_b")]
)
def test_groups_are_rounded_as_their_codec_rounds(name: str, codec: str) -> None:
    x = drawn()
    values, scale = quant.operand_format(name).quantize(x)
    assert scale is None
    packer = quant.codec(codec)
    assert torch.equal(values, packer.decode(packer.encode(x)))


def test_nvfp4_has_two_scales() -> None:
    x = drawn()
    values, scale = quant.operand_format("nvfp4").quantize(x)
    assert scale is not None
    groups = x.numpy().reshape(64, 6, 16)
    largest = np.abs(groups).max(2)
    outer = np.maximum(largest.max(1, keepdims=True) / np.float32(6 * 448), np.float32(2.0**-126))
    inner = np.minimum(largest / np.float32(6) / outer, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    step = (inner * outer)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.where(step > 0, groups / step, 0).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    expected = (codes.astype(np.float32) * inner[..., None]).reshape(64, 96)
    np.testing.assert_array_equal(scale.numpy(), outer)
    np.testing.assert_array_equal(values.numpy(), expected)


def test_int8_products_are_exact() -> None:
    name = quant.operand_format("int8")
    x, weight = name.quantize(drawn(32, 512)), name.quantize_weight(drawn(48, 512, seed=4))
    assert x.values.dtype == weight.values.dtype == torch.int8
    assert x.scale is not None
    assert weight.scale is not None
    exact = x.values.long() @ weight.values.long().T
    expected = exact.float() * x.scale * weight.scale.T
    assert torch.equal(quant.multiply(x, weight, torch.float32), expected)


@pytest.mark.parametrize("name", quant.operand_format_names())
def test_a_row_is_rounded_as_if_alone_and_the_product_is_near(name: str) -> None:
    known = quant.operand_format(name)
    x, weight = drawn(), drawn(48, seed=4)
    whole = known.quantize(x)
    alone = known.quantize(x[32:64])
    assert torch.equal(whole.values[32:64], alone.values)
    product = quant.multiply(whole, known.quantize_weight(weight), torch.float32)
    error = (product - x @ weight.T).norm() / (x @ weight.T).norm()
    assert error < (0.25 if name in ("nvfp4", "tt_bfp4") else 0.06)


def test_tenstorrents_weights_group_along_their_outputs() -> None:
    weight = drawn(48)
    rounded = quant.operand_format("tt_bfp8").quantize_weight(weight).values
    assert torch.equal(rounded, quant.fake_quantize_bfp8(weight, axis=0))
    assert not torch.equal(rounded, quant.fake_quantize_bfp8(weight, axis=1))


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match=r"no operand format 'fp7'; there are f32, bf16"):
        quant.operand_format("fp7")
