"""Formats of a matrix product's operands: what a weight or an activation is rounded to before it is multiplied.

Every value here is the exact value of a code of the format, as a float, so multiplying rounded operands with float32
accumulation is the format's arithmetic: the product of two codes is exact in float32. Scales that cover a whole row (a
token of the activations, an output feature of the weights) stay apart and are applied to the product, as the devices'
epilogues do; scales of smaller groups are inside the values. A row's rounding depends on that row alone, so it does not
matter what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn import functional

from hma_serve.quant.block_float import fake_quantize_block_float
from hma_serve.quant.microscaling import MxCodec, MxFp8, MxInt8
from hma_serve.quant.scaled import SMALLEST_SCALE, decode_e2m1, divide, encode_e2m1

if TYPE_CHECKING:
    from torch import Tensor

_NV_GROUP: Final = 16
_E2M1_LARGEST: Final = 6.0
_E4M3_LARGEST: Final = 448.0


class Operand(NamedTuple):
    """A rounded matrix.

    Attributes:
        values: [rows, features]: codes' values without the row's scale; int8 for `int8`.
        scale: float32 [rows, 1], the multiplier of each row; None: the values are whole.
    """

    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class OperandFormat:
    """One format.

    Attributes:
        name: What profiles call it.
        round_values: Rounds float32 [rows, features], groups along the features, under scales [rows, 1] if it has them.
        group: Features that share a scale; features are a multiple of it. 1: a whole row does, or none.
        largest: What a row's largest magnitude is scaled to; None: rows have no scale of their own.
        weights_by_output: A weight's groups run along its output features instead: Tenstorrent stores it as [in, out].
    """

    name: str
    round_values: Callable[[Tensor, Tensor | None], Tensor]
    group: int = 1
    largest: float | None = None
    weights_by_output: bool = False

    def scale(self, x: Tensor) -> Tensor | None:
        """Scales of the rows of [rows, features], float32 [rows, 1], if the format has them."""
        if self.largest is None:
            return None
        return divide(x.float().abs().amax(-1, keepdim=True), self.largest).clamp(min=SMALLEST_SCALE)

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> Operand:
        """Rounds [rows, features] of any float dtype.

        Args:
            x: The matrix.
            scale: Of its rows, where `x` is only a part of them; None: `self.scale(x)`.
        """
        scale = self.scale(x) if scale is None else scale
        return Operand(self.round_values(x, scale), scale)

    def quantize_weight(self, weight: Tensor) -> Operand:
        """Rounds a weight [out, in]."""
        if not self.weights_by_output:
            return self.quantize(weight)
        return Operand(self.quantize(weight.T).values.T.contiguous(), None)


def multiply(x: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
    """The product of a batch [tokens, in] and a weight [out, in], both rounded: [tokens, out].

    Accumulates in float32 (int8 in int32, exactly; bf16 as the device's own product does) and rounds once.
    """
    if x.values.dtype == torch.int8:
        product = torch._int_mm(x.values, weight.values.T).float()
    else:
        product = functional.linear(x.values, weight.values)
    if x.scale is not None:
        product = product * x.scale
    if weight.scale is not None:
        product = product * weight.scale.T
    return product.to(dtype)


_Rounding = Callable[["Tensor", "Tensor | None"], "Tensor"]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.float() if scale is None else x.float() / scale


def _plain(dtype: torch.dtype) -> _Rounding:
    return lambda x, _: x.to(dtype)


def _block_float(bits: int) -> _Rounding:
    return lambda x, _: fake_quantize_block_float(x.float(), bits)


def _mx(codec: MxCodec) -> _Rounding:
    return lambda x, _: codec.round_trip(x.float())


def _fp8(dtype: torch.dtype, largest: float) -> _Rounding:
    return lambda x, scale: _scaled(x, scale).clamp_(-largest, largest).to(dtype).float()


def _int8(x: Tensor, scale: Tensor | None) -> Tensor:
    return _scaled(x, scale).round_().clamp_(-127, 127).to(torch.int8)


def _nvfp4(x: Tensor, scale: Tensor | None) -> Tensor:
    """E2M1 elements and E4M3 scales per 16; the second scale, one for a tensor in NVIDIA's recipe, is one for a row."""
    groups = x.float().reshape(*x.shape[:-1], -1, _NV_GROUP)
    outer = torch.ones((), device=x.device) if scale is None else scale
    largest = divide(groups.abs().amax(-1), _E2M1_LARGEST) / outer
    inner = largest.clamp(max=_E4M3_LARGEST).to(torch.float8_e4m3fn).float()
    step = (inner * outer).unsqueeze(-1)
    codes = encode_e2m1(torch.where(step > 0, groups / step.clamp(min=SMALLEST_SCALE), 0.0))
    pairs = (codes[..., ::2] | (codes[..., 1::2] << 4)).contiguous()
    return decode_e2m1(pairs).view(groups.shape).mul_(inner.unsqueeze(-1)).flatten(-2)


_ALL: Final = (
    OperandFormat("f32", _plain(torch.float32)),
    OperandFormat("bf16", _plain(torch.bfloat16)),
    OperandFormat("tt_bfp8", _block_float(8), group=16, weights_by_output=True),
    OperandFormat("tt_bfp4", _block_float(4), group=16, weights_by_output=True),
    OperandFormat("fp8_e4m3fn", _fp8(torch.float8_e4m3fn, 448.0), largest=448.0),
    OperandFormat("fp8_e4m3fnuz", _fp8(torch.float8_e4m3fnuz, 240.0), largest=240.0),
    # Gaudi's reading has the codes of E4M3FN up to 240 and no larger ones.
    OperandFormat("fp8_e4m3_ieee", _fp8(torch.float8_e4m3fn, 240.0), largest=240.0),
    OperandFormat("mxfp8_e4m3", _mx(MxFp8()), group=32),
    OperandFormat("mxint8", _mx(MxInt8()), group=32),
    OperandFormat("nvfp4", _nvfp4, group=_NV_GROUP, largest=_E2M1_LARGEST * _E4M3_LARGEST),
    OperandFormat("int8", _int8, largest=127.0),
)
_BY_NAME: Final = {known.name: known for known in _ALL}


def operand_format(name: str) -> OperandFormat:
    """The format of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise ValueError(f"no operand format {name!r}; there are {', '.join(_BY_NAME)}")
    return found


def operand_format_names() -> tuple[str, ...]:
    """Every format by name."""
    return tuple(_BY_NAME)
