"""What packed pages hold for the attention kernel: two kinds of 8-bit elements under three kinds of scales."""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.decode.kernels import paged_decode


@dataclass(frozen=True, slots=True)
class PackedKind:
    """Constants of `hma_serve.decode.kernels.paged_decode`.

    Attributes:
        elements: Integers, or E4M3 codes.
        scales: Biased exponents per token and 16 channels; a float32 per token; or E4M3 codes per token and 16 channels
            under a float32 of the page.
    """

    elements: int
    scales: int


BLOCK_FLOAT = PackedKind(paged_decode.INTEGERS.value, paged_decode.POWERS.value)
INTEGER = PackedKind(paged_decode.INTEGERS.value, paged_decode.TOKENS.value)
CODED_INTEGER = PackedKind(paged_decode.INTEGERS.value, paged_decode.CODES.value)
FP8 = PackedKind(paged_decode.E4M3.value, paged_decode.TOKENS.value)
MXFP8 = PackedKind(paged_decode.E4M3.value, paged_decode.POWERS.value)
