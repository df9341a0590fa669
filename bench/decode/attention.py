"""One layer's attention: bytes per second over the measured copy bandwidth, beside torch's on BF16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch.nn import functional

from bench.decode.pages import KINDS, imbalanced, random_kv
from bench.decode.timing import Work, microseconds
from hma_serve.decode.kernels.attention_call import AttentionShape, AttentionWork, QueryOperand, StepRows

KV_HEADS, HEAD_DIM = 8, 128
CACHE_BYTES = 3e8
"""What the works of a graph should touch together, so that no cache holds it."""

CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8, 32, 128)
WARPS = 16
"""Programs of a multiprocessor."""


PARTS = {
    "attention": [(4, "tt_bfp8_b"), (8, "tt_bfp8_b"), (5, "tt_bfp8_b")],
    "codecs": [(4, name) for name in KINDS if name != "tt_bfp8_b"],
}
"""Query heads of a KV head, and the format."""

COMPILED = [(group, name, [64, 64]) for shapes in PARTS.values() for group, name in shapes if KINDS[name]]
"""Arguments of `fused_us`, small, that compile everything."""


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
        sdpa_us: torch's attention on contiguous BF16 of the same tokens; None: not measured.
        flex_us: flex_attention, compiled, on the same.
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
    flex_us: float | None = None


def fused_us(group: int, page_format: str, contexts: list[int], *, programs: int | None = None) -> tuple[float, int]:
    """Microseconds of a layer, and the bytes that it reads."""
    rows, kind = len(contexts), KINDS[page_format]
    probe = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * (1 if kind else 2)
    layers = max(1, min(8, math.ceil(CACHE_BYTES / probe)))
    kv = random_kv(kind, contexts, layers, KV_HEADS, HEAD_DIM)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    step = StepRows(slots, kv.packed, kv.length, torch.zeros_like(slots))
    if programs is None:
        programs = WARPS * torch.cuda.get_device_properties(0).multi_processor_count
    work = AttentionWork(AttentionShape(rows, KV_HEADS, group, HEAD_DIM, programs, 1), step, 0, "cuda")
    work.number()
    query = QueryOperand.of(torch.randn(rows, KV_HEADS * group, HEAD_DIM, device="cuda").bfloat16())
    out = torch.empty(rows, KV_HEADS * group, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def layer(index: int) -> Work:
        pages = kv.pages(index % layers)
        return lambda: work.attend(query, pages, out, scale=HEAD_DIM**-0.5, overlap=True)

    return microseconds([layer(index) for index in range(max(8, layers))]), kv.read_bytes


def torch_us(group: int, batch: int, context: int, *, flex: bool = False) -> float:
    """Attention of one query token on contiguous BF16 keys and values."""
    size = (batch, KV_HEADS, context, HEAD_DIM)
    copies = max(1, min(8, math.ceil(CACHE_BYTES / (4 * math.prod(size)))))
    kv = [torch.randn((2, *size), device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    q = torch.randn(batch, KV_HEADS * group, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        return microseconds([partial(compiled, q, k, v, enable_gqa=True) for k, v in kv * 4])
    sdpa = functional.scaled_dot_product_attention
    return microseconds([partial(sdpa, q, k, v, enable_gqa=True) for k, v in kv * 4])


def measure(copy: float, part: str) -> Iterator[AttentionRow]:
    """All rows of a part; the largest batch of the longest context is left out."""
    for group, page_format in PARTS[part]:
        for context, batch in product(CONTEXTS, BATCHES):
            for balanced in (True, False):
                if batch * context > 32 * 16384 or (not balanced and (batch == 1 or part != "attention")):
                    continue
                yield _row(copy, group, page_format, batch, context, balanced)


def _row(copy: float, group: int, page_format: str, batch: int, context: int, balanced: bool) -> AttentionRow:
    contexts = [context] * batch if balanced else imbalanced(batch, context)
    us, read = fused_us(group, page_format, contexts)
    rate = read / us * 1e6
    sdpa = torch_us(group, batch, context) if balanced and page_format == "tt_bfp8_b" else None
    flex = None
    if sdpa is not None and group == 4 and (batch, context) == (32, 4096):
        flex = torch_us(group, batch, context, flex=True)
    return AttentionRow(group, page_format, batch, context, balanced, us, rate / 1e12, rate / copy, sdpa, flex)
