"""One layer's attention: bytes per second over the measured copy bandwidth, beside torch's on BF16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.decode.beside import CACHE_BYTES, GROUPS, HEAD_DIM, KV_HEADS, points, sdpa_us, unless_refused
from bench.decode.pages import KINDS, TAIL, imbalanced, random_kv
from bench.decode.timing import CHAIN, Work, microseconds
from hma_serve.decode.kernels.attention_call import (
    AttentionShape,
    AttentionWork,
    QueryOperand,
    StepRows,
    warps_at_once,
)

PARTS = {
    "attention": [(group, "tt_bfp8_b") for group in GROUPS],
    "codecs": [(4, name) for name in KINDS if name != "tt_bfp8_b"],
}
"""Query heads of a KV head, and the format."""

COMPILED = {
    part: [f"attention.fused_us({group}, {name!r}, [64, 64])" for group, name in shapes if KINDS[name]]
    for part, shapes in PARTS.items()
}
"""By part: calls, small, that compile everything."""


@dataclass(frozen=True)
class AttentionRow:
    """One measurement.

    Attributes:
        group: Query heads of a KV head.
        page_format: The codec.
        batch: Sequences.
        context: Packed tokens of each, on average.
        balanced: All alike.
        us: Microseconds.
        tb_per_s: Bytes of pages over time.
        of_copy: That over the copy bandwidth of the run.
        sdpa_us: torch's attention on contiguous BF16 of the same tokens; None: not measured, or it refuses.
    """

    group: int
    page_format: str
    batch: int
    context: int
    balanced: bool
    us: float
    tb_per_s: float
    of_copy: float
    sdpa_us: float | None = None


def work_of(group: int, rows: StepRows, kind: int = 0, *, queries: int = 1) -> AttentionWork:
    """For this GPU."""
    programs = warps_at_once(group, queries) * torch.cuda.get_device_properties(0).multi_processor_count
    shape = AttentionShape(len(rows.slot), KV_HEADS, group, HEAD_DIM, programs, 1, queries)
    return AttentionWork(shape, rows, kind, "cuda")


def fused_us(group: int, page_format: str, contexts: list[int], tokens: int = 1, queries: int = 1) -> tuple[float, int]:
    """Microseconds of a layer, and the bytes that its pages hold."""
    kind = KINDS[page_format]
    probe = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * (1 if kind else 2)
    layers = max(1, min(8, math.ceil(CACHE_BYTES / probe)))
    kv = random_kv(kind, contexts, layers, KV_HEADS, HEAD_DIM, max(TAIL, tokens))
    rows = kv.rows([tokens] * len(contexts), queries)
    work = work_of(group, rows, queries=queries)
    work.number()
    size = (len(rows.slot), KV_HEADS * group, HEAD_DIM)
    query = QueryOperand.of(torch.randn(size, device="cuda").bfloat16())
    out = torch.empty(size, device="cuda", dtype=torch.bfloat16)

    def layer(index: int) -> Work:
        pages = kv.pages(index % layers)
        return lambda: work.attend(query, pages, out, scale=HEAD_DIM**-0.5, overlap=True)

    return microseconds([layer(index) for index in range(CHAIN)]), kv.read_bytes


def measure(copy: float, part: str) -> Iterator[AttentionRow]:
    """All rows of a part."""
    for group, page_format in PARTS[part]:
        for context, batch in points():
            for balanced in (True, False):
                if balanced or batch > 1:
                    yield _row(copy, group, page_format, batch, context, balanced)


def _row(copy: float, group: int, page_format: str, batch: int, context: int, balanced: bool) -> AttentionRow:
    contexts = [context] * batch if balanced else imbalanced(batch, context)
    us, read = fused_us(group, page_format, contexts)
    rate = read / us * 1e6
    beside = balanced and page_format == "tt_bfp8_b"
    sdpa = unless_refused(lambda: sdpa_us(group, batch, context)) if beside else None
    return AttentionRow(group, page_format, batch, context, balanced, us, rate / 1e12, rate / copy, sdpa)
