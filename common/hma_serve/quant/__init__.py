"""Every codec of the KV block format on tensors, and every format of a matrix product's operands."""

from __future__ import annotations

from typing import Final

import torch

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec
from hma_serve.quant.block_float import TtBlockFloat, fake_quantize_bfp8, fake_quantize_block_float
from hma_serve.quant.fp8 import all_fp8
from hma_serve.quant.integer import Int4, Int8
from hma_serve.quant.microscaling import MxFp4, MxFp8, MxInt8, NvFp4
from hma_serve.quant.offset import offset_scores, reference_attention, subtract_offset
from hma_serve.quant.operands import (
    Operand,
    OperandFormat,
    multiply,
    operand_format,
    operand_format_names,
)
from hma_serve.quant.plain import Plain

__all__ = [
    "GROUP_TOKENS",
    "Operand",
    "OperandFormat",
    "Rounding",
    "TorchCodec",
    "codec",
    "codec_names",
    "fake_quantize_bfp8",
    "fake_quantize_block_float",
    "multiply",
    "offset_scores",
    "operand_format",
    "operand_format_names",
    "reference_attention",
    "subtract_offset",
]

_ALL: Final[tuple[TorchCodec, ...]] = (
    Plain("f32", torch.float32),
    Plain("bf16", torch.bfloat16),
    TtBlockFloat(8),
    TtBlockFloat(4),
    TtBlockFloat(2),
    *all_fp8(),
    MxFp8(),
    MxInt8(),
    MxFp4(),
    NvFp4(),
    Int8(),
    Int4(by_channel=False),
    Int4(by_channel=True),
)
_BY_NAME: Final = {known.name: known for known in _ALL}
_ALIASES: Final = {f"{name}.token_head": name for name in _BY_NAME if f"{name}.tensor" in _BY_NAME}


def codec_names() -> tuple[str, ...]:
    """Names of all codecs of this build."""
    return tuple(_BY_NAME)


def codec(name: str) -> TorchCodec:
    """The codec of that name, as in `hma_serve.kvblock`.

    Raises:
        ValueError: No such codec; the message lists those there are.
    """
    found = _BY_NAME.get(_ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"no codec {name!r}; there are {', '.join(_BY_NAME)}")
    return found
