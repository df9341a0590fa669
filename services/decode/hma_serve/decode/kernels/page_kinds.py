"""What packed pages hold for the attention kernel: two kinds of 8-bit elements under two kinds of scales."""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.decode.kernels import paged_decode


@dataclass(frozen=True, slots=True)
class PackedKind:
    """Constants of `hma_serve.decode.kernels.paged_decode`.

    Attributes:
        elements: Integers, or E4M3 codes.
        scales: Biased exponents per token and 16 channels, or a float32 per token.
    """

    elements: int
    scales: int


BLOCK_FLOAT = PackedKind(paged_decode.INTEGERS.value, paged_decode.POWERS.value)
INTEGER = PackedKind(paged_decode.INTEGERS.value, paged_decode.TOKENS.value)
FP8 = PackedKind(paged_decode.E4M3.value, paged_decode.TOKENS.value)
MXFP8 = PackedKind(paged_decode.E4M3.value, paged_decode.POWERS.value)
