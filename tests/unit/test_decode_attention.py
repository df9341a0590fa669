"""Attention over mixed pages against a dense float64 reference of the same decoded cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hma_serve.decode import attention
from hma_serve.decode.attention import Span, TorchPagedAttention
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation
from hma_serve.kvblock import channel_order
from hma_serve.quant import codec, codec_names
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED

KV_HEADS, HEAD_DIM = 2, 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FORMATS = ("f32", "bf16", "tt_bfp8_b")


@dataclass
class Cached:
    """A sequence in the pool, and what its pages mean: [kv_heads, length, head_dim] each."""

    pages: Reservation
    length: int
    keys: torch.Tensor
    values: torch.Tensor


def make_pool(
    dtype: torch.dtype = torch.float32, *, head_dim: int = HEAD_DIM, formats: tuple[str, ...] = FORMATS
) -> PagePool:
    geometry = KvGeometry(layers=2, kv_heads=KV_HEADS, head_dim=head_dim)
    pool = PagePool(geometry, packed_formats=formats, plain_dtype=dtype, capacity_tokens=8000)
    # What nobody wrote must never matter, whatever bits it has.
    pool.memory.fill_(0xFF)
    return pool


def cached(
    pool: PagePool,
    layer: int,
    k_format: str,
    v_format: str,
    groups: int,
    plain: int,
    total: int,
    *,
    interleaved: bool = False,
) -> Cached:
    """A sequence of `groups` packed groups and `plain` tokens behind them, all with random KV."""
    need = Need.of(
        packed_tokens=groups * 32,
        total_tokens=total,
        k_format=k_format,
        v_format=v_format,
        interleaved=interleaved,
    )
    head_dim = pool.geometry.head_dim
    theirs = channel_order(head_dim, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    ours = channel_order(head_dim, KV_ROPE_PAIRING_INTERLEAVED, KV_ROPE_PAIRING_HALF_SPLIT)
    pages = pool.reserve(need)
    pool.clear(torch.cat([pages.plain_k, pages.plain_v]))
    tensors = []
    for role, page_format, packed, plains in (
        (Role.K, k_format, pages.packed_k, pages.plain_k),
        (Role.V, v_format, pages.packed_v, pages.plain_v),
    ):
        decoded = torch.empty(KV_HEADS, 0, head_dim)
        if groups:
            turned = interleaved and role is Role.K
            values = torch.randn(KV_HEADS, groups * 32, head_dim)
            units = codec(page_format).encode(values[..., theirs] if turned else values)
            # As from two chips that hold a range of the heads each.
            for heads in (slice(0, 1), slice(1, KV_HEADS)):
                pool.store(page_format, role, layer, packed, heads, units[heads])
            decoded = codec(page_format).decode(units)
            decoded = decoded[..., ours] if turned else decoded
        rest = torch.randn(KV_HEADS, plain, head_dim).to(pool.plain_dtype)
        for token in range(plain):
            pool.plain(layer)[plains[token // 32], :, token % 32] = rest[:, token]
        tensors.append(torch.cat([decoded, rest.float()], dim=1))
    return Cached(pages, groups * 32 + plain, tensors[0], tensors[1])


def expected(sequence: Cached, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention in float64: q, k, v [count, heads, head_dim]."""
    keys = torch.cat([sequence.keys, k.float().transpose(0, 1)], dim=1).double()
    values = torch.cat([sequence.values, v.float().transpose(0, 1)], dim=1).double()
    size = q.shape[1] // KV_HEADS
    keys, values = keys.repeat_interleave(size, 0), values.repeat_interleave(size, 0)
    scores = torch.einsum("thd,hsd->hts", q.double(), keys) * q.shape[2] ** -0.5
    positions = sequence.length + torch.arange(q.shape[0])
    hidden = torch.arange(keys.shape[1]) > positions[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,hsd->thd", weights, values)


def check(pool: PagePool, layer: int, heads: int, sequences: list[Cached], counts: list[int], limit: float) -> None:
    tokens, head_dim = sum(counts), pool.geometry.head_dim
    q = torch.randn(tokens, heads, head_dim).to(pool.plain_dtype)
    k, v = (torch.randn(tokens, KV_HEADS, head_dim).to(pool.plain_dtype) for _ in range(2))
    spans = [Span(s.pages, s.length, count) for s, count in zip(sequences, counts, strict=True)]
    out = TorchPagedAttention(pool, heads).plan(spans)(layer, q, k, v)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    row = 0
    for sequence, count in zip(sequences, counts, strict=True):
        rows = slice(row, row + count)
        wanted = expected(sequence, q[rows], k[rows], v[rows])
        error = (out[rows].double() - wanted).norm() / wanted.norm()
        assert error < limit
        row += count


LENGTHS = [(0, 0), (0, 5), (1, 0), (3, 31), (7, 32), (2, 77), (4, 1), (1, 33)]
"""Packed groups, and plain tokens behind them: on, before and behind the edges of pages."""


@pytest.mark.parametrize("group_size", [1, 4, 5, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_every_codec_equals_dense_attention(head_dim: int, group_size: int) -> None:
    """Keys of every codec with values of the next, every other sequence in interleaved channels, all in one batch."""
    torch.manual_seed(group_size)
    names = codec_names()
    pool = make_pool(head_dim=head_dim, formats=names)
    sequences = []
    for number, (k_format, v_format) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
        groups, plain = LENGTHS[number % len(LENGTHS)]
        groups = groups or 2
        total = groups * 32 + plain + 40
        sequences.append(cached(pool, 1, k_format, v_format, groups, plain, total, interleaved=number % 2 == 1))
    heads = KV_HEADS * group_size
    check(pool, 1, heads, sequences, [1] * len(sequences), 2e-6)
    check(pool, 1, heads, sequences, [(1, 3, 17, 32)[number % 4] for number in range(len(sequences))], 2e-6)


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_batches_of_every_size_equal_dense_attention(batch: int) -> None:
    torch.manual_seed(batch)
    pool = make_pool(head_dim=64)
    sequences = []
    for number in range(batch):
        groups, plain = LENGTHS[(number + 3) % len(LENGTHS)]
        page_format = FORMATS[number % 3]
        sequences.append(cached(pool, 1, page_format, page_format, groups, plain, groups * 32 + plain + 40))
    # Single tokens together, then several tokens of a sequence at once.
    check(pool, 1, 4 * KV_HEADS, sequences, [1] * batch, 2e-6)
    check(pool, 1, 4 * KV_HEADS, sequences, [(32, 1, 1, 17, 3)[number % 5] for number in range(batch)], 2e-6)


def test_formats_mix_in_one_batch_and_within_a_sequence() -> None:
    torch.manual_seed(0)
    pool = make_pool()
    sequences = [cached(pool, 0, k, v, 2, 9, 120) for k in FORMATS for v in FORMATS]
    check(pool, 0, 2 * KV_HEADS, sequences, [1] * len(sequences), 2e-6)


def test_the_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    sequences = [cached(pool, 0, "tt_bfp8_b", "tt_bfp8_b", groups, 40, groups * 32 + 80) for groups in (1, 9, 30)]
    monkeypatch.setattr(attention, "BLOCK_BYTES", 3 * KV_HEADS * 32 * HEAD_DIM * 4)
    check(pool, 0, 2 * KV_HEADS, sequences, [1, 1, 1], 2e-6)
    check(pool, 0, 2 * KV_HEADS, sequences, [1, 4, 32], 2e-6)


class _Counting:
    """A codec that notes how many bytes it was asked to decode at once."""

    def __init__(self, inner: Any, sizes: list[int]) -> None:
        self._inner = inner
        self._sizes = sizes

    def decode(self, packed: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self._inner.decode(packed)
        self._sizes.append(values.nbytes)
        return values


def test_packed_pages_are_decoded_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    pool, page, sizes = make_pool(), KV_HEADS * 32 * HEAD_DIM * 4, list[int]()
    sequences = [cached(pool, 0, "tt_bfp8_b", "f32", groups, 5, groups * 32 + 80) for groups in (30, 9)]
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * page)
    monkeypatch.setattr(attention, "codec", lambda name: _Counting(codec(name), sizes))
    for counts in ([1, 1], [7, 32]):
        sizes.clear()
        check(pool, 0, 2 * KV_HEADS, sequences, counts, 2e-6)
        assert max(sizes) <= 4 * page
        # Keys once and values once.
        assert sum(sizes) == 2 * 39 * page


def test_bfloat16_pages() -> None:
    torch.manual_seed(1)
    pool = make_pool(torch.bfloat16)
    sequences = [cached(pool, 0, "tt_bfp8_b", "bf16", 4, 20, 200), cached(pool, 0, "f32", "f32", 1, 3, 90)]
    check(pool, 0, 4 * KV_HEADS, sequences, [1, 1], 4e-3)


def test_page_tables_are_reused_and_renewed_across_pages() -> None:
    """Forty single steps through three pages of two sequences: tables change when pages do, and only then."""
    torch.manual_seed(2)
    pool, heads = make_pool(), 2 * KV_HEADS
    paged = TorchPagedAttention(pool, heads)
    sequences = [cached(pool, 0, "f32", "f32", 1, 0, 110), cached(pool, 0, "f32", "f32", 0, 20, 110)]
    for step in range(40):
        q = torch.randn(2, heads, HEAD_DIM)
        k, v = torch.randn(2, KV_HEADS, HEAD_DIM), torch.randn(2, KV_HEADS, HEAD_DIM)
        plan = paged.plan([Span(s.pages, s.length, 1) for s in sequences])
        out = plan(0, q, k, v)
        for row, sequence in enumerate(sequences):
            rows = slice(row, row + 1)
            torch.testing.assert_close(
                out[rows].double(), expected(sequence, q[rows], k[rows], v[rows]), rtol=1e-4, atol=1e-5, msg=f"{step=}"
            )
            sequence.keys = torch.cat([sequence.keys, k[rows].transpose(0, 1)], dim=1)
            sequence.values = torch.cat([sequence.values, v[rows].transpose(0, 1)], dim=1)
            sequence.length += 1
