"""Every codec of the KV block format on tensors, and the emulation of block-float arithmetic."""

from __future__ import annotations

from typing import Final

import torch

from hma_serve.quant.base import GROUP_TOKENS, Rounding, TorchCodec
from hma_serve.quant.bfp8 import TtBfp8B, fake_quantize_bfp8
from hma_serve.quant.plain import Plain

__all__ = ["GROUP_TOKENS", "Rounding", "TorchCodec", "codec", "codec_names", "fake_quantize_bfp8"]

_ALL: Final[tuple[TorchCodec, ...]] = (
    Plain("f32", torch.float32),
    Plain("bf16", torch.bfloat16),
    TtBfp8B(),
)
_BY_NAME: Final = {known.name: known for known in _ALL}


def codec_names() -> tuple[str, ...]:
    """Names of all codecs of this build."""
    return tuple(_BY_NAME)


def codec(name: str) -> TorchCodec:
    """The codec of that name.

    Raises:
        ValueError: No such codec; the message lists those there are.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise ValueError(f"no codec {name!r}; there are {', '.join(_BY_NAME)}")
    return found
