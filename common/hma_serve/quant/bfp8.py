"""`tt_bfp8_b`: 8-bit block float in Tenstorrent's tiles, and the same quantisation without forming tiles.

Arithmetic is on powers of two alone, so that every step is exact in float32 and results do not depend on the device:
for 16 values with largest exponent E, magnitude = round(|x| * 2^(133 - E)) and x' = +-magnitude * 2^(E - 133).

The decoder runs for every block of pages inside attention, so it is written for few operations on few bytes: rows of 16
are gathered into output order while they are still bytes, by indices computed once per geometry and device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn.functional import hardshrink

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec

if TYPE_CHECKING:
    from torch import Tensor

TILE: Final = 32
FACE: Final = 16
EXPONENT_BYTES: Final = 64
TILE_BYTES: Final = EXPONENT_BYTES + TILE * TILE
_LARGEST: Final = 127
_LARGEST_SUBNORMAL: Final = 2.0**-126 - 2.0**-149
_SEVEN: Final = torch.tensor(7, dtype=torch.int8)  # tensors: wrapping a Python number costs as much as the operation
_MAGNITUDE: Final = torch.tensor(_LARGEST, dtype=torch.int8)
_SMALLEST_POWER: Final = 2.0**-120  # exponent 7: groups below decode to zero


class TtBfp8B(TorchCodec):
    """head_dim / 32 tiles of 1088 bytes; bit for bit the vendor's host packer, or its chip's with `nearest_away`."""

    name = "tt_bfp8_b"

    def group_bytes(self, head_dim: int) -> int:
        """34 bytes a channel."""
        return head_dim // TILE * TILE_BYTES

    def _encode(self, x: Tensor, rounding: Rounding) -> Tensor:
        units, _, head_dim = x.shape
        count, rest = divmod(head_dim, TILE)
        if rest:
            raise ValueError(f"tt_bfp8_b needs a multiple of {TILE} channels, not {head_dim}")
        layout = _layout(count, x.device)
        values = x.float().view(units, count * 64, FACE).index_select(1, layout.tile_rows)
        values = hardshrink(values, _LARGEST_SUBNORMAL)
        exponents = _largest_bits(values) >> 23
        scale = ((255 - exponents.clamp(min=1)) << 23).view(torch.float32)  # 2^(128 - E), always normal
        codes = _round(values.mul_(scale).mul_(32.0), rounding).clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        codes = codes.abs() | (codes & -128)  # two's complement to sign-magnitude
        tiles = torch.empty((units, count, TILE_BYTES), dtype=torch.uint8, device=x.device)
        tiles[..., :EXPONENT_BYTES] = exponents.view(units, count, EXPONENT_BYTES)
        tiles[..., EXPONENT_BYTES:] = codes.view(torch.uint8).view(units, count, TILE * TILE)
        return tiles.view(units, count * TILE_BYTES)

    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        units, unit_bytes = packed.shape
        count, rest = divmod(unit_bytes, TILE_BYTES)
        if rest:
            raise ValueError(f"tt_bfp8_b has no units of {unit_bytes} bytes")
        layout = _layout(count, packed.device)
        codes = packed.view(torch.int8).view(units, unit_bytes // FACE, FACE).index_select(1, layout.element_rows)
        signs = codes >> _SEVEN
        codes.bitwise_xor_(signs & _MAGNITUDE).sub_(signs)  # sign-magnitude to two's complement
        exponents = packed.index_select(1, layout.exponents).view(-1)
        steps = layout.steps.index_select(0, exponents.int())
        values = codes.float().view(-1, FACE).mul_(steps.unsqueeze(1))
        return values.to(dtype).view(units * GROUP_TOKENS, count * TILE)


def fake_quantize_bfp8(x: Tensor, axis: int = -1, rounding: Rounding = "nearest_even") -> Tensor:
    """Quantise and dequantise groups of 16 along an axis, as a tile would, without packing.

    Along the last axis of [..., tokens, head_dim] the result equals the codec's `decode(encode(x))` in every value,
    but for the sign of zeros. A group that holds Inf or NaN becomes NaN.

    Args:
        x: float32 or bfloat16; the axis is a multiple of 16 long.
        axis: Along which 16 neighbours share an exponent.
        rounding: What happens half-way.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: The axis does not divide into groups, or the dtype is another.
    """
    if x.shape[axis] % FACE:
        raise ValueError(f"axis of {x.shape[axis]} does not divide into groups of {FACE}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"expected float32 or bfloat16, not {x.dtype}")
    moved = x.movedim(axis, -1)
    values = hardshrink(moved.to(torch.float32).contiguous().view(-1, FACE), _LARGEST_SUBNORMAL)
    power = (_largest_bits(values) & 0x7F800000).view(torch.float32)  # 2^(E - 127); Inf for Inf and NaN
    scale = 64.0 / power.clamp(min=_SMALLEST_POWER)
    step = torch.where(power < _SMALLEST_POWER, 0.0, power * 2.0**-6)
    _round(values.mul_(scale), rounding).clamp_(-_LARGEST, _LARGEST).mul_(step)
    return values.to(x.dtype).view(moved.shape).movedim(-1, axis)


def _largest_bits(values: Tensor) -> Tensor:
    """Bits of the largest magnitude along the last axis, kept as an axis of 1.

    Magnitudes order as their bits do (NaN above Inf), and the integer reduction is five times faster.
    """
    return values.abs().view(torch.int32).amax(-1, keepdim=True)


def _round(values: Tensor, rounding: Rounding) -> Tensor:
    """Round to whole numbers in place."""
    if rounding == "nearest_even":
        return values.round_()
    if rounding == "nearest_away":
        whole = values.trunc()
        return values.sub_(whole).mul_(2.0).trunc_().add_(whole)  # |x| + 0.5 could itself round up
    raise ValueError(f"bfp8 rounds nearest_even or nearest_away, not {rounding}")


class _Layout(NamedTuple):
    """Where the rows of 16 channels of a unit lie, and what its exponents mean, on one device.

    Attributes:
        element_rows: Of each output row in order (token, then 16 channels), its place among the unit's 16-byte runs.
        exponents: Of each output row, its exponent's place among the unit's bytes.
        tile_rows: Of each stored row in order, its place among the output rows.
        steps: By exponent, what one unit of magnitude is worth: 2^(E - 133), 0 below 7, NaN at 255. float32 [256].
    """

    element_rows: Tensor
    exponents: Tensor
    tile_rows: Tensor
    steps: Tensor


@lru_cache(maxsize=64)
def _layout(tiles: int, device: torch.device) -> _Layout:
    # Stored rows are numbered (tile, face row, face column, row); output rows (face row, row, tile, face column).
    tile_rows = torch.arange(tiles * 64).view(2, FACE, tiles, 2).permute(2, 0, 3, 1).reshape(-1)
    stored = tile_rows.argsort()
    tile, row = stored // 64, stored % 64
    steps = ((torch.arange(256, dtype=torch.int32) - 6).clamp(min=0) << 23).view(torch.float32)
    steps[255] = torch.nan
    return _Layout(
        element_rows=(tile * (TILE_BYTES // FACE) + EXPONENT_BYTES // FACE + row).to(device),
        exponents=(tile * TILE_BYTES + row).to(device),
        tile_rows=tile_rows.to(device),
        steps=steps.to(device),
    )
