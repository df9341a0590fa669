"""What others take for attention on BF16 keys and values of the same tokens: torch's two, and FlashInfer."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from bench.decode.timing import CHAIN, microseconds

KV_HEADS, HEAD_DIM = 8, 128
CACHE_BYTES = 3e8
"""What the works of a graph should touch together, so that no cache holds it."""

CONTEXTS = (1024, 4096, 16384)
"""Tokens of a sequence."""

BATCHES = (1, 8, 32, 128)
"""Sequences."""

GROUPS = (4, 8, 5)
"""Query heads of a KV head."""


@dataclass(frozen=True)
class BesideRow:
    """Attention of one query token on BF16 by something else; microseconds.

    Attributes:
        group: Query heads of a KV head.
        batch: Sequences.
        context: Tokens of each.
        flex_us: flex_attention, compiled for the shape, on contiguous keys and values; None: it refuses.
        flashinfer_us: FlashInfer's batched decode over pages of 16 tokens, on tensor cores; None: it refuses or is not
            there.
    """

    group: int
    batch: int
    context: int
    flex_us: float | None
    flashinfer_us: float | None


def points() -> Iterator[tuple[int, int]]:
    """Contexts and batches."""
    return product(CONTEXTS, BATCHES)


def unless_refused(time: Callable[[], float | None]) -> float | None:
    """What it measures; None where another's attention refuses a shape, as the largest have 2^31 elements a tensor."""
    try:
        return time()
    except RuntimeError as refused:
        print(f"refused: {refused}", file=sys.stderr, flush=True)
        return None


def sdpa_us(group: int, batch: int, context: int, *, tokens: int = 1) -> float:
    """torch's attention of the last tokens, without a mask."""
    q = _queries(group, batch, tokens)
    sdpa = functional.scaled_dot_product_attention
    return microseconds([partial(sdpa, q, k, v, enable_gqa=True) for k, v in _chain(_contiguous(batch, context))])


def flex_us(group: int, batch: int, context: int) -> float:
    """flex_attention of one token, compiled for the shape."""
    # Shapes are many, and torch keeps only so many of a function.
    torch.compiler.reset()
    q = _queries(group, batch, 1)
    flex = torch.compile(flex_attention, dynamic=False)
    return microseconds([partial(flex, q, k, v, enable_gqa=True) for k, v in _chain(_contiguous(batch, context))])


def _chain(caches: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    return islice(cycle(caches), CHAIN)


def _queries(group: int, batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, KV_HEADS * group, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def _contiguous(batch: int, context: int) -> list[torch.Tensor]:
    """Keys and values [2, batch, KV heads, context, channels], so many that no cache holds them."""
    size = (2, batch, KV_HEADS, context, HEAD_DIM)
    copies = max(1, min(8, math.ceil(CACHE_BYTES / (2 * math.prod(size)))))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]


def flashinfer_us(group: int, batch: int, context: int) -> float | None:
    """FlashInfer's attention of one query token over BF16 pages; None: it is not there."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    flashinfer = importlib.import_module("flashinfer")
    page = 16
    caches = [
        kv.view(2, batch, KV_HEADS, -1, page, HEAD_DIM).permute(1, 3, 0, 2, 4, 5).flatten(0, 1).contiguous()
        for kv in _contiguous(batch, context)
    ]
    pages = batch * context // page
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    # What stands still while a graph is replayed.
    first = torch.arange(0, pages + 1, context // page, dtype=torch.int32, device="cuda")
    indices = torch.randperm(pages, dtype=torch.int32, device="cuda")
    full = torch.full((batch,), page, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=first.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=full.clone(),
    )
    wrapper.plan(
        first,
        indices,
        full,
        KV_HEADS * group,
        KV_HEADS,
        HEAD_DIM,
        page,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = _queries(group, batch, 1).squeeze(2)
    return microseconds([partial(wrapper.run, q, cache) for cache in _chain(caches)])


COMPILED = [
    "beside.flashinfer_us(4, 1, 1024)",
    *(f"beside.compile_flex({group}, {context})" for group in GROUPS for context in CONTEXTS),
]
"""Calls that fill the caches of torch's and of FlashInfer's compiler."""


def compile_flex(group: int, context: int) -> None:
    """flex_attention for every batch of a context; torch finds it again in another process."""
    for each, batch in points():
        if each == context:
            unless_refused(partial(flex_us, group, batch, context))


def measure() -> Iterator[BesideRow]:
    """Every point and group; SDPA stands beside the kernel's own rows."""
    for group in GROUPS:
        for context, batch in points():
            flex, flashinfer = (
                unless_refused(partial(time, group, batch, context)) for time in (flex_us, flashinfer_us)
            )
            yield BesideRow(group, batch, context, flex, flashinfer)
