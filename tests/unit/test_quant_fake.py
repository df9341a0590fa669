"""Block-float emulation without tiles gives the codec's round trip."""

from __future__ import annotations

import pytest
import torch

from hma_serve import quant
from hma_serve.quant import fake_quantize_bfp8

ROUNDINGS: list[quant.Rounding] = ["nearest_even", "nearest_away"]


def values(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(2, 64, 96, generator=generator)
    if kind == "ties":
        return (drawn * 200).round() / 128
    if kind == "smallest":
        return drawn * torch.exp2(torch.randint(-130, -112, (2, 64, 6), generator=generator).float()).repeat_interleave(
            16, -1
        )
    if kind == "largest":
        return drawn * 2.0**124
    return drawn


@pytest.mark.parametrize("kind", ["normal", "ties", "smallest", "largest"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_codecs_round_trip(kind: str, rounding: quant.Rounding, dtype: torch.dtype) -> None:
    codec = quant.codec("tt_bfp8_b")
    x = values(kind).to(dtype)
    right = codec.decode(codec.encode(x, rounding), dtype)
    found = fake_quantize_bfp8(x, rounding=rounding)
    assert found.dtype == dtype
    assert torch.equal(found, right)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_any_axis_is_grouped(axis: int) -> None:
    x = torch.randn(32, 48, 16, generator=torch.Generator().manual_seed(1))
    found = fake_quantize_bfp8(x, axis)
    right = fake_quantize_bfp8(x.movedim(axis, -1).contiguous()).movedim(-1, axis)
    assert found.shape == x.shape
    assert torch.equal(found, right)


def test_groups_are_independent_and_quantising_twice_changes_nothing() -> None:
    x = values("normal")
    once = fake_quantize_bfp8(x)
    assert torch.equal(fake_quantize_bfp8(once), once)
    x[0, 0, :16] *= 1000
    assert torch.equal(fake_quantize_bfp8(x)[0, 0, 16:], once[0, 0, 16:])


def test_worked_example_rounds_both_ways() -> None:
    group = torch.zeros(16)
    group[:4] = torch.tensor([1.0, 64.5 / 64, 1 / 128, 3 / 128])
    assert fake_quantize_bfp8(group)[:4].tolist() == [1.0, 1.0, 0.0, 2 / 64]
    assert fake_quantize_bfp8(group, rounding="nearest_away")[:4].tolist() == [1.0, 65 / 64, 1 / 64, 2 / 64]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spoils_its_group_alone(bad: float) -> None:
    x = torch.ones(3, 32)
    x[1, 3] = bad
    found = fake_quantize_bfp8(x)
    assert found[1, :16].isnan().all()
    assert found.isnan().sum() == 16


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 16"):
        fake_quantize_bfp8(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        fake_quantize_bfp8(torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="nearest_even or nearest_away"):
        fake_quantize_bfp8(torch.zeros(16), rounding="up")  # type: ignore[arg-type]
