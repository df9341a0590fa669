"""The kit's judgement of payloads: every honest rounding passes, every mistake that a producer makes is caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hma_serve.cli.kv_meaning import compare
from hma_serve.kvblock import Codec, codec, codec_names
from hma_serve.kvblock.codecs.fp8 import Fp8
from hma_serve.v1.kv_block_pb2 import (
    KV_ROUNDING_NEAREST_AWAY,
    KV_ROUNDING_NEAREST_EVEN,
    KV_ROUNDING_TRUNCATE,
    KvRounding,
)

HEADS, TOKENS, D = 2, 64, 64
NAMES = codec_names()
BLOCK_FLOAT = {"tt_bfp8_b": 8, "tt_bfp4_b": 4, "tt_bfp2_b": 2}
SCALED = [name for name in NAMES if name not in ("f32", "bf16")]
NIBBLES = ("mxfp4", "nvfp4", "int4", "int4.channel")

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def drawn(seed: int = 0) -> Floats:
    """Heads and tokens of unlike scales, as keys have them; nothing is zero."""
    rng = np.random.default_rng(seed)
    scales = 2.0 ** rng.integers(-3, 4, (HEADS, TOKENS, 1))
    return (rng.standard_normal((HEADS, TOKENS, D)) * scales).astype(np.float32)


def packed(name: str, values: Floats, rounding: KvRounding.ValueType = KV_ROUNDING_NEAREST_EVEN) -> Bytes:
    return np.ascontiguousarray(codec(name).encode(values, rounding))


def judged(name: str, payload: Bytes, values: Floats) -> str:
    payload = np.ascontiguousarray(payload)
    codec(name).check_payload(payload, *values.shape)
    return compare(codec(name), payload, values)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_encoder_is_right(name: str) -> None:
    for seed in range(3):
        assert judged(name, packed(name, drawn(seed)), drawn(seed)) == ""


@pytest.mark.parametrize("name", NAMES)
def test_zeros_tiny_and_equal_values_are_right(name: str) -> None:
    values = drawn()
    values[:, 3] = 0
    values[:, 5] = 1e-41
    values[:, 7] = 2.5
    values[:, 9, ::2] = 0
    assert judged(name, packed(name, values), values) == ""
    assert judged(name, packed(name, np.zeros_like(values)), np.zeros_like(values)) == ""


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("tt_bfp8_b", KV_ROUNDING_NEAREST_AWAY),
        ("tt_bfp4_b", KV_ROUNDING_NEAREST_AWAY),
        ("tt_bfp4_b", KV_ROUNDING_TRUNCATE),
        ("tt_bfp2_b", KV_ROUNDING_NEAREST_AWAY),
    ],
)
def test_the_vendors_other_roundings_are_right(name: str, rounding: KvRounding.ValueType) -> None:
    assert judged(name, packed(name, drawn(), rounding), drawn()) == ""


@pytest.mark.parametrize("name", [name for name in NAMES if name != "f32"])
def test_cutting_off_is_a_rounding(name: str) -> None:
    """Half a step towards zero, then to nearest: what a producer that truncates writes."""
    values, packer = drawn(), codec(name)
    steps = packer.steps(packed(name, values), *values.shape)
    moved = np.sign(values) * np.maximum(np.abs(values) - steps * np.float32(0.49), 0)
    # Scales stay those of the values, so the largest of every group must.
    largest = np.abs(values) == np.abs(values).reshape(HEADS, TOKENS, -1, 16).max(-1, keepdims=True).repeat(
        16, -1
    ).reshape(values.shape)
    assert judged(name, packed(name, np.where(largest, values, moved)), values) == ""


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".head", ".tensor"))])
def test_calibrated_scales_have_room(name: str) -> None:
    values = drawn()
    packer = codec(name)
    assert isinstance(packer, Fp8)
    for factor, right in ((4, True), (0.25, False)):  # too small a scale cuts the largest values off
        scale = float(np.abs(values).max() * factor / packer.decode(_largest(packer), 1, 32, 1).max())
        assert (judged(name, np.ascontiguousarray(packer.encode(values, scale=scale)), values) == "") == right


def _largest(packer: Codec) -> Bytes:
    """A payload of the largest element under a scale of 1."""
    assert isinstance(packer, Fp8)
    return np.ascontiguousarray(packer.encode(np.full((1, 32, 1), 1e9, np.float32), scale=1.0))


def test_scales_twice_as_coarse_are_right_and_coarser_ones_are_not() -> None:
    values = drawn()
    for factor, right in ((1.9, True), (4.1, False)):
        largest = np.abs(values).max(-1, keepdims=True)
        scales = (largest / 127 * factor).astype(np.float32)
        codes = np.rint(values / scales).astype(np.int8).view(np.uint8).reshape(HEADS, 2, 32 * D)
        payload = np.concatenate([codes, scales.astype("<f4").view(np.uint8).reshape(HEADS, 2, 128)], axis=2)
        assert (judged("int8", payload, values) == "") == right


# What producers get wrong. Each takes values and gives a payload that is well-formed.


def _zeroed(name: str, values: Floats) -> Bytes:
    values = values.copy()
    values[0, 3:32] = 0
    return packed(name, values)


def _one_zeroed(name: str, values: Floats) -> Bytes:
    values = values.copy()
    loudness = np.abs(values[1]).max(-1)
    # The quietest, which a norm over all would not notice; where 32 tokens share a step, it is below that step.
    values[1, loudness.argmax() if name == "int4.channel" else loudness.argmin()] = 0
    return packed(name, values)


def _shifted(name: str, values: Floats) -> Bytes:
    return packed(name, np.roll(values, 1, axis=1))


def _swapped_heads(name: str, values: Floats) -> Bytes:
    return packed(name, values)[::-1]


def _swapped_neighbours(name: str, values: Floats) -> Bytes:
    return packed(name, values.reshape(*values.shape[:2], -1, 2)[..., ::-1].reshape(values.shape))


def _swapped_groups(name: str, values: Floats) -> Bytes:
    return packed(name, values)[:, ::-1]


def _transposed(name: str, values: Floats) -> Bytes:
    tiles = values.reshape(HEADS, 2, 32, 2, 32).transpose(0, 1, 4, 3, 2)
    return packed(name, tiles.reshape(values.shape))


def _negated(name: str, values: Floats) -> Bytes:
    values = values.copy()
    values[0, 40] *= -1
    return packed(name, values)


def _wrong_rounding(name: str, values: Floats) -> Bytes:
    """Towards zero by one and a half steps, then to nearest."""
    steps = codec(name).steps(packed(name, values), *values.shape)
    if not steps.any():
        return packed(name, np.nextafter(values, np.float32(0)))
    moved = np.sign(values) * np.maximum(np.abs(values) - np.float32(1.5) * steps, 0)
    return packed(name, moved.astype(np.float32))


MISTAKES: list[Callable[[str, Floats], Bytes]] = [
    _zeroed,
    _one_zeroed,
    _shifted,
    _swapped_heads,
    _swapped_neighbours,
    _swapped_groups,
    _transposed,
    _negated,
    _wrong_rounding,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_caught(name: str, mistake: Callable[[str, Floats], Bytes]) -> None:
    values = drawn()
    assert judged(name, mistake(name, values), values).startswith("meaning: ")


def _scale_places(name: str) -> tuple[slice, str]:
    """Where a unit's scales stand, and their type."""
    if name in BLOCK_FLOAT:
        return slice(0, 64), "u1"
    if name.startswith("mx"):
        return slice(-D, None), "u1"
    if name == "nvfp4":
        return slice(-2 * D - 4, -4), "u1"
    if name.startswith("int4"):
        return slice(-4 * D, -2 * D), "<f2"
    return slice(-4 if "." in name else -128, None), "<f4"


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_whose_exponent_is_off_by_one_is_caught(name: str, up: bool) -> None:
    values = drawn()
    payload = packed(name, values)
    place, kind = _scale_places(name)
    scales = payload[1, 1, place].copy().view(kind)
    # One bit of magnitude says little of a scale: there a tile is needed to tell.
    at = slice(None) if "." in name or name == "tt_bfp2_b" else slice(5, 6)
    if kind == "u1":
        scales[at] = scales[at].astype(int) + (8 if name == "nvfp4" else 1) * (1 if up else -1)
    else:
        scales[at] *= 2 if up else 0.5
    payload[1, 1, place] = scales.view(np.uint8)
    assert judged(name, payload, values).startswith("meaning: ")


@pytest.mark.parametrize("name", [name for name in SCALED if not name.endswith((".head", ".tensor"))])
def test_scales_of_the_neighbours_are_caught(name: str) -> None:
    values = drawn()
    payload = packed(name, values)
    place, kind = _scale_places(name)
    scales = payload[0, 0, place].copy().view(kind)
    payload[0, 0, place] = np.roll(scales, 1).view(np.uint8)
    assert judged(name, payload, values).startswith("meaning: ")


@pytest.mark.parametrize("name", [*NIBBLES, "tt_bfp4_b"])
def test_swapped_nibbles_are_caught(name: str) -> None:
    values = drawn()
    payload = packed(name, values)
    elements = slice(64, 576) if name == "tt_bfp4_b" else slice(0, 16 * D)
    payload[0, 0, elements] = payload[0, 0, elements] >> 4 | payload[0, 0, elements] << 4
    if name == "tt_bfp4_b":
        codes = payload[0, 0, elements]
        assert not ((codes & 15 == 8) | (codes >> 4 == 8)).any()
    assert judged(name, payload, values).startswith("meaning: ")


def test_too_coarse_a_rounding_everywhere_is_caught_although_no_value_is_a_step_off() -> None:
    values = np.random.default_rng(0).uniform(1, 2, (HEADS, TOKENS, D)).astype(np.float32)
    steps = codec("bf16").steps(packed("bf16", values), *values.shape)
    exact = codec("bf16").decode(packed("bf16", values), *values.shape)
    away = np.where(exact > values, exact - steps, exact + steps)  # always the farther neighbour
    said = judged("bf16", packed("bf16", away.astype(np.float32)), values)
    assert "root mean square" in said


def test_the_message_says_where() -> None:
    values = drawn()
    spoilt = values.copy()
    spoilt[1, 17, 9] += 100
    said = judged("bf16", packed("bf16", spoilt), values)
    assert "1 of 8192 values" in said
    assert "(1, 17, 9)" in said


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_distance_of_neighbouring_values(name: str) -> None:
    """Of a value's code, the codes beside it: found by packing values a little apart."""
    packer: Codec = codec(name)
    values = drawn()
    payload = packed(name, values)
    decoded, steps = packer.decode(payload, *values.shape), packer.steps(payload, *values.shape)
    assert steps.shape == values.shape
    again = packer.decode(packed(name, decoded), *values.shape)
    assert (np.abs(again - decoded) <= steps).all()
    if name == "f32":
        assert not steps.any()
    else:
        largest = np.abs(values).max()
        assert (np.abs(decoded - values)[np.abs(values) < largest / 2] <= 2 * steps[np.abs(values) < largest / 2]).all()
        assert (steps > 0).all()
