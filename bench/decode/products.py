"""The products of the 8B's step by the package's kernels and by the library, alone and in whole steps of one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.decode.attention import work_of
from bench.decode.beside import HEAD_DIM, KV_HEADS
from bench.decode.pages import KINDS, random_kv
from bench.decode.step import RandomWeights, config_of, fits, products_ms, whole_ms
from hma_serve.decode.kernels.skinny import MOST_ROWS
from hma_serve.decode.kernels.step_model import StepModel

MODEL = "8B"

ROWS = (1, 2, 8, 16, 24, 32, 48, 64, 128)
"""Of the vectors' side; above `MOST_ROWS` every product is the library's."""

STEPS = (
    ("tt_bfp8_b", 2, 4096),
    ("tt_bfp8_b", 8, 4096),
    ("tt_bfp8_b", 32, 1024),
    ("tt_bfp8_b", 32, 4096),
    ("bf16", 32, 16384),
)
"""Format of the packed prompts, sequences and packed tokens of each."""


@dataclass(frozen=True)
class ProductRow:
    """All products of a step, one after the other; milliseconds.

    Attributes:
        model: Which shape.
        rows: Of the step.
        own_ms: By the package's kernels; None: they do not take so many rows.
        library_ms: By cuBLASLt.
    """

    model: str
    rows: int
    own_ms: float | None
    library_ms: float


@dataclass(frozen=True)
class ProductStepRow:
    """A whole step; milliseconds.

    Attributes:
        model: Which shape.
        page_format: Of the packed prompts; `bf16`: they were materialised.
        batch: Sequences.
        context: Packed tokens of each.
        own_ms: Products by the package's kernels.
        library_ms: By cuBLASLt.
    """

    model: str
    page_format: str
    batch: int
    context: int
    own_ms: float
    library_ms: float


def measure() -> Iterator[ProductRow | ProductStepRow]:
    """All of it, as far as two models and the KV fit this GPU."""
    config = config_of(MODEL)
    own, library = (StepModel(config, RandomWeights(config), own_products=which) for which in (True, False))
    for rows in ROWS:
        yield ProductRow(MODEL, rows, products_ms(own, rows) if rows <= MOST_ROWS else None, products_ms(library, rows))
    for page_format, batch, context in STEPS:
        if not fits(MODEL, page_format, batch, context, models=2):
            continue
        kv = random_kv(KINDS[page_format], [context] * batch, config.num_layers, KV_HEADS, HEAD_DIM)
        single = kv.rows()
        works = [work_of(config.group_size, single)]
        own_ms, library_ms = (whole_ms(model, kv, single, works) for model in (own, library))
        yield ProductStepRow(MODEL, page_format, batch, context, own_ms, library_ms)
        del kv
        torch.cuda.empty_cache()
