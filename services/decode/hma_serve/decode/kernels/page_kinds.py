"""What packed pages hold for the attention kernel: two kinds of 8-bit elements under three kinds of scales."""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.decode.kernels import half_page


@dataclass(frozen=True, slots=True)
class PackedKind:
    """Constants of `hma_serve.decode.kernels.half_page`.

    Attributes:
        elements: Integers, or E4M3 codes.
        scales: Biased exponents per token and 16 channels; a float32 per token; or E4M3 codes per token and 16 channels
            under a float32 of the page.
    """

    elements: int
    scales: int


BLOCK_FLOAT = PackedKind(half_page.INTEGERS.value, half_page.POWERS.value)
INTEGER = PackedKind(half_page.INTEGERS.value, half_page.TOKENS.value)
CODED_INTEGER = PackedKind(half_page.INTEGERS.value, half_page.CODES.value)
FP8 = PackedKind(half_page.E4M3.value, half_page.TOKENS.value)
MXFP8 = PackedKind(half_page.E4M3.value, half_page.POWERS.value)
