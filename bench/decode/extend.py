"""An extend: several query tokens of each sequence, pages read once for some of them or once for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from bench.decode.attention import fused_us
from bench.decode.beside import sdpa_us
from hma_serve.decode.kernels.attention_call import queries_at_once

SHAPES = [(4, "tt_bfp8_b"), (8, "tt_bfp8_b"), (5, "tt_bfp8_b"), (4, "fp8_e4m3fn")]
"""Query heads of a KV head, and the format."""
POINTS = [(1, 4096), (8, 4096), (1, 16384)]
"""Sequences, and packed tokens of each."""
TOKENS = (4, 32)
"""Query tokens of each."""


def ways(group: int) -> list[int]:
    """How many query tokens are read together: one, or as many as fill one, two or three tensor-core products."""
    return sorted({1, *(queries_at_once(group, tiles) for tiles in (1, 2, 3))})


COMPILED = [
    f"attention.fused_us({group}, {name!r}, [64, 64], 32, {queries})"
    for group, name in SHAPES
    for queries in ways(group)
]
"""Calls, small, that compile everything."""


@dataclass(frozen=True)
class ExtendRow:
    """Attention of several query tokens of each sequence.

    Attributes:
        group: Query heads of a KV head.
        page_format: The codec.
        batch: Sequences.
        context: Packed tokens of each.
        tokens: Query tokens of each, the last ones.
        queries: How many of them are read together; 1: each reads all pages for itself.
        us: Microseconds of a layer.
        page_bytes: What the pages of all sequences hold.
        read_bytes: What programs load of it: that once for every `queries` tokens.
        sdpa_us: torch's attention on contiguous BF16 of the same tokens, without a mask.
    """

    group: int
    page_format: str
    batch: int
    context: int
    tokens: int
    queries: int
    us: float
    page_bytes: int
    read_bytes: int
    sdpa_us: float


def measure() -> Iterator[ExtendRow]:
    """All of it."""
    for (group, page_format), (batch, context), tokens in product(SHAPES, POINTS, TOKENS):
        sdpa = sdpa_us(group, batch, context, tokens=tokens)
        for queries in ways(group):
            us, held = fused_us(group, page_format, [context] * batch, tokens, queries)
            read = held * math.ceil(tokens / queries)
            yield ExtendRow(group, page_format, batch, context, tokens, queries, us, held, read, sdpa)
