"""Decode's attention over a cache whose packed keys are offset and whose newest are not."""

from __future__ import annotations

import pytest
import torch

from hma_serve import quant
from hma_serve.decode.attention import Span, TorchPagedAttention
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, Need, PagePool

LAYERS, KV_HEADS, GROUP, D = 2, 2, 3, 32


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("k_format", "limit"), [("f32", 1e-5), ("tt_bfp8_b", 0.02)])
def test_scores_of_packed_keys_get_the_offset_back(queries: int, k_format: str, limit: float) -> None:
    torch.manual_seed(queries)
    pool = PagePool(
        KvGeometry(LAYERS, KV_HEADS, D),
        packed_formats=("f32", "tt_bfp8_b"),
        plain_dtype=torch.float32,
        capacity_tokens=8000,
    )
    offsets = torch.zeros(LAYERS, KV_HEADS, D)
    offsets[1, :, 5] = torch.tensor([200.0, -150.0])
    paged = TorchPagedAttention(pool, KV_HEADS * GROUP, offsets)
    spans, wanted = [], []
    q = torch.randn(2 * queries, KV_HEADS * GROUP, D)
    k, v = torch.randn(2 * queries, KV_HEADS, D), torch.randn(2 * queries, KV_HEADS, D)
    k += offsets[1]
    for row, groups in enumerate((2, 5)):
        rows = slice(row * queries, (row + 1) * queries)
        tokens = 32 * groups
        pages = pool.reserve(
            Need.of(packed_tokens=tokens, total_tokens=tokens + queries, k_format=k_format, v_format="f32")
        )
        pool.clear(torch.cat([pages.plain_k, pages.plain_v]))
        keys = torch.randn(KV_HEADS, tokens, D) + offsets[1].unsqueeze(1)
        values = torch.randn(KV_HEADS, tokens, D)
        moved = quant.codec(k_format).encode(quant.subtract_offset(keys, offsets[1]))
        pool.store(k_format, Role.K, 1, pages.packed_k, slice(None), moved)
        pool.store("f32", Role.V, 1, pages.packed_v, slice(None), quant.codec("f32").encode(values))
        spans.append(Span(pages, tokens, queries))
        for query in range(rows.start, rows.stop):
            seen = slice(rows.start, query + 1)
            all_keys = torch.cat([keys, k[seen].transpose(0, 1)], dim=1).double()
            all_values = torch.cat([values, v[seen].transpose(0, 1)], dim=1).double()
            wanted.append(quant.reference_attention(q[query].double().unsqueeze(1), all_keys, all_values).squeeze(1))
    found = paged.plan(spans)(1, q, k, v).double()
    right = torch.stack(wanted)
    assert (found - right).norm() < limit * right.norm()
