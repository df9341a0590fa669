"""Who adds the parts of a (row, head): a launch of its own, or the last program that leaves one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from bench.decode.attention import fused_us
from bench.decode.pages import imbalanced

FOLDS = (1, 4, 16, 1 << 20)
POINTS = [(1, 1024), (8, 1024), (32, 1024), (1, 4096), (8, 4096), (32, 4096), (128, 4096)]
"""Sequences, and packed tokens of each."""

COMPILED = [(4, "tt_bfp8_b", [64, 64], 1, 1, fold) for fold in FOLDS]
"""Arguments of `fused_us`, small, that compile everything."""


@dataclass(frozen=True)
class FoldRow:
    """Attention of one query token with parts added by the last program of a (row, head) itself.

    Attributes:
        batch: Sequences.
        context: Packed tokens of each, on average.
        balanced: All alike.
        fold: Up to so many parts; 1: always a launch of their own, more than there are programs: never one.
        us: Microseconds.
        of_copy: Bytes of pages over that time, over the copy bandwidth of the run.
    """

    batch: int
    context: int
    balanced: bool
    fold: int
    us: float
    of_copy: float


def measure(copy: float) -> Iterator[FoldRow]:
    """All of it, with four query heads and block float."""
    for (batch, context), balanced, fold in product(POINTS, (True, False), FOLDS):
        if balanced or batch > 1:
            contexts = [context] * batch if balanced else imbalanced(batch, context)
            us, read = fused_us(4, "tt_bfp8_b", contexts, fold=fold)
            yield FoldRow(batch, context, balanced, fold, us, read / us * 1e6 / copy)
