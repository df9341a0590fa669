"""Block float of 8, 4 and 2 bits in Tenstorrent's tiles, and 8-bit quantisation without forming tiles.

Arithmetic is on powers of two alone, so that every step is exact in float32 and results do not depend on the device:
for 16 values with largest exponent E and m magnitude bits, magnitude = round(|x| * 2^(126 + m - E)) and
x' = +-magnitude * 2^(E - 126 - m).

The decoder runs for every block of pages inside attention, so it is written for few operations on few bytes: rows of 16
are gathered into output order while they are still bytes, by indices computed once per geometry and device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn.functional import hardshrink

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec
from hma_serve.quant.packing import pack_codes, unpack_codes

if TYPE_CHECKING:
    from torch import Tensor

TILE: Final = 32
FACE: Final = 16
EXPONENT_BYTES: Final = 64
_LARGEST_SUBNORMAL: Final = 2.0**-126 - 2.0**-149
_SEVEN: Final = torch.tensor(7, dtype=torch.int8)  # tensors: wrapping a Python number costs as much as the operation
_MAGNITUDE: Final = torch.tensor(127, dtype=torch.int8)


class TtBlockFloat(TorchCodec):
    """head_dim / 32 tiles; bit for bit the vendor's host packer, or its chip's.

    The chip rounds 8-bit elements ties away (`nearest_away`) and cuts 4-bit elements out of those (`truncate`).

    Args:
        bits: Of an element: 8, 4 or 2.
    """

    def __init__(self, bits: int) -> None:
        self.name = f"tt_bfp{bits}_b"
        self._bits = bits
        self._tile_bytes = EXPONENT_BYTES + TILE * TILE * bits // 8

    def group_bytes(self, head_dim: int) -> int:
        """34, 18 or 10 bytes a channel."""
        return head_dim // TILE * self._tile_bytes

    def _encode(self, x: Tensor, rounding: Rounding) -> Tensor:
        units, _, head_dim = x.shape
        count, rest = divmod(head_dim, TILE)
        if rest:
            raise ValueError(f"{self.name} needs a multiple of {TILE} channels, not {head_dim}")
        layout = _layout(count, self._bits, x.device)
        values = x.float().view(units, count * 64, FACE).index_select(1, layout.tile_rows)
        values = hardshrink(values, _LARGEST_SUBNORMAL)
        exponents = _largest_bits(values) >> 23
        scale = ((255 - exponents.clamp(min=1)) << 23).view(torch.float32)  # 2^(128 - E), always normal
        codes = pack_codes(self._codes(values.mul_(scale), rounding), self._bits)
        tiles = torch.empty((units, count, self._tile_bytes), dtype=torch.uint8, device=x.device)
        tiles[..., :EXPONENT_BYTES] = exponents.view(units, count, EXPONENT_BYTES)
        tiles[..., EXPONENT_BYTES:] = codes.view(units, count, self._tile_bytes - EXPONENT_BYTES)
        return tiles.view(units, count * self._tile_bytes)

    def _codes(self, normal: Tensor, rounding: Rounding) -> Tensor:
        """Sign-magnitude codes, uint8, of values divided by 2^(E - 128); overwrites them."""
        bits, cut = self._bits, 0
        if rounding == "truncate" and bits == 4:
            bits, cut, rounding = 8, 4, "nearest_away"
        largest = (1 << (bits - 1)) - 1
        whole = _round(normal.mul_(2.0 ** (bits - 3)), rounding).clamp_(-largest, largest).to(torch.int8)
        if self._bits == 8:
            return (whole.abs() | (whole & -128)).view(torch.uint8)  # two's complement to sign-magnitude
        magnitude = whole.abs() >> cut
        negative = (whole < 0) & (magnitude > 0)
        return (magnitude | (negative.to(torch.int8) << (self._bits - 1))).view(torch.uint8)

    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        units, unit_bytes = packed.shape
        count, rest = divmod(unit_bytes, self._tile_bytes)
        if rest:
            raise ValueError(f"{self.name} has no units of {unit_bytes} bytes")
        layout = _layout(count, self._bits, packed.device)
        row_bytes = FACE * self._bits // 8
        rows = packed.view(units, unit_bytes // row_bytes, row_bytes).index_select(1, layout.element_rows)
        exponents = packed.index_select(1, layout.exponents).view(-1)
        steps = layout.steps.index_select(0, exponents.int())
        values = self._magnitudes(rows, layout).view(-1, FACE).mul_(steps.unsqueeze(1))
        return values.to(dtype).view(units * GROUP_TOKENS, count * TILE)

    def _magnitudes(self, rows: Tensor, layout: _Layout) -> Tensor:
        """Signed magnitudes, float32, of packed rows, which are overwritten."""
        if self._bits < 8:
            return layout.magnitudes.index_select(0, rows.view(-1).int())
        codes = rows.view(torch.int8)
        signs = codes >> _SEVEN
        codes.bitwise_xor_(signs & _MAGNITUDE).sub_(signs)  # sign-magnitude to two's complement
        return codes.float()


def fake_quantize_bfp8(x: Tensor, axis: int = -1, rounding: Rounding = "nearest_even") -> Tensor:
    """`fake_quantize_block_float` with 8 bits, the type of activations and weights alike."""
    return fake_quantize_block_float(x, 8, axis, rounding)


def fake_quantize_block_float(x: Tensor, bits: int, axis: int = -1, rounding: Rounding = "nearest_even") -> Tensor:
    """Quantise and dequantise groups of 16 along an axis, as a tile would, without packing.

    Along the last axis of [..., tokens, head_dim] the result equals the codec's `decode(encode(x))` in every value,
    but for the sign of zeros. A group that holds Inf or NaN becomes NaN.

    Args:
        x: float32 or bfloat16; the axis is a multiple of 16 long.
        bits: Of an element: 8, 4 or 2.
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
    whole, largest = 2.0 ** (bits - 2), (1 << (bits - 1)) - 1
    smallest = 2.0 ** (bits - 1 - 127)  # groups below it decode to zero
    moved = x.movedim(axis, -1)
    values = hardshrink(moved.to(torch.float32).contiguous().view(-1, FACE), _LARGEST_SUBNORMAL)
    power = (_largest_bits(values) & 0x7F800000).view(torch.float32)  # 2^(E - 127); Inf for Inf and NaN
    scale = whole / power.clamp(min=smallest)
    step = torch.where(power < smallest, 0.0, power / whole)
    _round(values.mul_(scale), rounding).clamp_(-largest, largest).mul_(step)
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
    raise ValueError(f"block float rounds nearest_even or nearest_away, not {rounding}")


class _Layout(NamedTuple):
    """Where the rows of 16 channels of a unit lie, and what its bytes mean, on one device.

    Attributes:
        element_rows: Of each output row in order (token, then 16 channels), its place among the unit's runs of codes.
        exponents: Of each output row, its exponent's place among the unit's bytes.
        tile_rows: Of each stored row in order, its place among the output rows.
        steps: By exponent, what one unit of magnitude is worth: 2^(E - 126 - m), 0 below m, NaN at 255. float32 [256].
        magnitudes: By byte, the signed magnitudes in it. float32 [256, 8 / bits].
    """

    element_rows: Tensor
    exponents: Tensor
    tile_rows: Tensor
    steps: Tensor
    magnitudes: Tensor


@lru_cache(maxsize=64)
def _layout(tiles: int, bits: int, device: torch.device) -> _Layout:
    # Stored rows are numbered (tile, face row, face column, row); output rows (face row, row, tile, face column).
    tile_rows = torch.arange(tiles * 64).view(2, FACE, tiles, 2).permute(2, 0, 3, 1).reshape(-1)
    stored = tile_rows.argsort()
    tile, row = stored // 64, stored % 64
    row_bytes = FACE * bits // 8
    tile_bytes = EXPONENT_BYTES + TILE * TILE * bits // 8
    steps = ((torch.arange(256, dtype=torch.int32) - (bits - 2)).clamp(min=0) << 23).view(torch.float32)
    steps[255] = torch.nan
    sign = 1 << (bits - 1)
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8).unsqueeze(1), bits).float()
    return _Layout(
        element_rows=(tile * (tile_bytes // row_bytes) + EXPONENT_BYTES // row_bytes + row).to(device),
        exponents=(tile * tile_bytes + row).to(device),
        tile_rows=tile_rows.to(device),
        steps=steps.to(device),
        magnitudes=torch.where(codes < sign, codes, sign - codes).to(device),
    )
