"""Random KV in pages, for the attention kernels: what lies where, and the float64 answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hma_serve.decode.kernels.attention_call import (
    AttentionShape,
    AttentionWork,
    LayerPages,
    PartMemory,
    QueryOperand,
    StepRows,
    together,
)
from hma_serve.decode.kernels.fragment_order import arrange_plain
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT
from hma_serve.decode.kernels.page_orders import fragment_page, packed_kind
from hma_serve.decode.page_order import Role
from hma_serve.quant import codec


@dataclass
class PagedCase:
    """One layer's problem and its answer."""

    work: AttentionWork
    parts: PartMemory
    query: QueryOperand
    pages: LayerPages
    expected: torch.Tensor
    scale: float

    def error(self, out: torch.Tensor) -> float:
        """Relative L2 error; NaN where nothing was written."""
        return float((out.double() - self.expected).norm() / self.expected.norm())


def paged_case(
    shape: AttentionShape,
    sequences: list[tuple[int, int]],
    counts: list[int] | None = None,
    *,
    k_format: str = "tt_bfp8_b",
    v_format: str = "tt_bfp8_b",
    offset: bool = False,
    materialise: bool = False,
    spread: int = 3,
    device: str = "cpu",
    seed: int = 0,
) -> PagedCase:
    """Sequences of (packed pages, plain tokens), their pages in any order.

    The last `counts` plain tokens of each are asked about, by default one; together they are the shape's rows. Vectors
    are of unit variance times a power of two, up to `spread` either way. What was packed is BF16 in memory if it is to
    materialise; the answer is that of what was packed all the same.
    """
    counts = counts or [1] * len(sequences)
    generator = torch.Generator(device).manual_seed(seed)
    kv, group, dim = shape.kv_heads, shape.group, shape.head_dim
    k_kind, v_kind = (BLOCK_FLOAT, BLOCK_FLOAT) if materialise else (packed_kind(k_format), packed_kind(v_format))
    assert k_kind is not None
    assert v_kind is not None
    packed_pages = sum(packed for packed, _ in sequences)
    plain_pages = sum(-(-plain // 32) for _, plain in sequences)

    def noise(*size: int) -> torch.Tensor:
        x = torch.randn(*size, device=device, generator=generator)
        power = torch.randint(-spread, spread + 1, size[:-1], device=device, generator=generator)
        return x * torch.exp2(power.float()).unsqueeze(-1)

    def packed(page_format: str, keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
        units = codec(page_format).encode(noise(max(1, packed_pages), kv, 32, dim))
        values = codec(page_format).decode(units).double()
        if materialise:
            moved = values + offsets[:, None].double() if keys and offsets is not None else values
            arranged = [arrange_plain(page.bfloat16(), keys).view(torch.uint8) for page in moved]
            return torch.stack(arranged), values
        order = fragment_page(page_format, Role.K if keys else Role.V, dim)
        return order.arrange(units.flatten(2)), values

    offsets = noise(kv, dim) if offset else None
    k_pages, k_values = packed(k_format, True)
    v_pages, v_values = packed(v_format, False)
    plain = noise(max(1, 2 * plain_pages), kv, 32, dim).bfloat16()
    slots = torch.randperm(len(sequences), device=device, generator=generator)
    longest = max(packed + -(-tail // 32) for packed, tail in sequences)
    tables = torch.zeros(2, len(sequences), longest, dtype=torch.int32, device=device)
    unit = max(k_pages.shape[-1], v_pages.shape[-1], 64 * dim) // 16
    places = torch.randperm(2 * packed_pages + 2 * plain_pages, device=device, generator=generator) * unit
    memory = torch.randint(0, 256, (kv, len(places) * unit * 16), device=device, generator=generator).byte()

    def put(page: torch.Tensor, place: torch.Tensor) -> None:
        for head in range(kv):
            where = int(place) * 16
            memory[head, where : where + page.shape[-1]] = page[head]

    q = noise(shape.rows, kv * group, dim).bfloat16()
    expected = torch.zeros(shape.rows, kv * group, dim, dtype=torch.float64, device=device)
    rows = StepRows.empty(shape.rows, device)
    parts = PartMemory(shape.programs, shape.columns, dim, device)
    work = AttentionWork(shape, rows, 0, device, parts)
    scale, at, plain_at, row = dim**-0.5, 0, 0, 0
    for number, (count, tail) in enumerate(sequences):
        slot, tail_pages = int(slots[number]), -(-tail // 32)
        taken = places[2 * (at + plain_at) :][: 2 * (count + tail_pages)].view(2, -1)
        tables[:, slot, : count + tail_pages] = taken.int()
        ids = torch.arange(at, at + count, device=device)
        k_ids = torch.arange(plain_at, plain_at + tail_pages, device=device)
        v_ids = k_ids + plain_pages
        for page in range(count):
            put(k_pages[at + page], taken[0, page])
            put(v_pages[at + page], taken[1, page])
        for page in range(tail_pages):
            put(arrange_plain(plain[k_ids[page]], True).view(torch.uint8), taken[0, count + page])
            put(arrange_plain(plain[v_ids[page]], False).view(torch.uint8), taken[1, count + page])
        if tail % 32:
            # What nobody has written yet may be anything.
            hole = torch.full((kv, 32 - tail % 32, dim), torch.nan, dtype=torch.bfloat16, device=device)
            for keys, tail_ids, place in ((True, k_ids, taken[0, -1]), (False, v_ids, taken[1, -1])):
                last = torch.cat([plain[tail_ids[-1], :, : tail % 32], hole], 1)
                put(arrange_plain(last, keys).view(torch.uint8), place)
        at, plain_at = at + count, plain_at + tail_pages
        asked = slice(row, row + counts[number])
        rows.slot[asked], rows.packed[asked] = slot, 0 if materialise else count
        length = 32 * count + tail - torch.arange(counts[number] - 1, -1, -1, device=device)
        rows.length[asked] = length.int()
        rows.more[asked] = torch.tensor(together(counts[number], shape.queries), dtype=torch.int32, device=device)
        row += counts[number]
        moved = k_values[ids].transpose(0, 1).flatten(1, 2)
        if offsets is not None:
            moved = moved + offsets[:, None].double()
        tail_k = plain[k_ids].double().transpose(0, 1).flatten(1, 2)[:, :tail]
        tail_v = plain[v_ids].double().transpose(0, 1).flatten(1, 2)[:, :tail]
        all_keys = torch.cat([moved, tail_k], 1)
        values = torch.cat([v_values[ids].transpose(0, 1).flatten(1, 2), tail_v], 1)
        queries = q[asked].double().view(-1, kv, group, dim)
        scores = torch.einsum("nkgd,ktd->nkgt", queries, all_keys) * scale
        later = torch.arange(32 * count + tail, device=device) >= length[:, None]
        weights = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
        expected[asked] = torch.einsum("nkgt,ktd->nkgd", weights, values).flatten(1, 2)
    return PagedCase(
        work,
        parts,
        QueryOperand.of(q, None if materialise else offsets),
        LayerPages(memory.view(torch.int32), tables[0], tables[1], k_kind, v_kind),
        expected,
        scale,
    )
