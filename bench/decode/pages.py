"""A layer's memory full of random pages, quickly: timing needs finite scales and scattered addresses, not meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.kernels.attention_call import LayerPages, StepRows, together
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, CODED_INTEGER, FP8, INTEGER, MXFP8, PackedKind

TAIL = 17
"""Tokens of each sequence that are BF16."""

KINDS: dict[str, PackedKind | None] = {
    "tt_bfp8_b": BLOCK_FLOAT,
    "int8": INTEGER,
    "fp8_e4m3fn": FP8,
    "mxfp8_e4m3": MXFP8,
    "nvfp4": CODED_INTEGER,
    "bf16": None,
}
"""One format for each way in which the kernel reads pages: every other format is read as one of these."""

_PATTERN_PAGES = 64
_UNIT = 16


def page_bytes(kind: PackedKind | None, head_dim: int) -> int:
    """Of one role and head."""
    if kind is None:
        return 2 * GROUP_TOKENS * head_dim
    if kind in (INTEGER, FP8):
        return GROUP_TOKENS * head_dim + 4 * GROUP_TOKENS
    return GROUP_TOKENS * head_dim + 2 * head_dim + (_UNIT if kind == CODED_INTEGER else 0)


@dataclass(frozen=True)
class KvMemory:
    """The KV of a batch in one format.

    Attributes:
        layers: int32 [layers, kv_heads, words].
        tables: int32 [2, rows, pages].
        kind: Of packed pages; None: all are plain.
        packed: int32 [rows], packed pages.
        length: int32 [rows], tokens with those behind the packed ones.
        read_bytes: What a step reads of one layer.
    """

    layers: torch.Tensor
    tables: torch.Tensor
    kind: PackedKind | None
    packed: torch.Tensor
    length: torch.Tensor
    read_bytes: int

    def rows(self, counts: list[int] | None = None, queries: int = 1) -> StepRows:
        """The last tokens of every sequence, by default one, so many of which are read together; all of kind 0."""
        counts = counts or [1] * len(self.length)
        each = torch.tensor(counts, device="cuda")
        slot = torch.arange(len(counts), dtype=torch.int32, device="cuda").repeat_interleave(each)
        before = torch.tensor([place for count in counts for place in reversed(range(count))], device="cuda").int()
        more = torch.tensor([place for count in counts for place in together(count, queries)], device="cuda").int()
        packed, length = (values.repeat_interleave(each) for values in (self.packed, self.length))
        return StepRows(slot, packed, length - before, torch.zeros_like(slot), more)

    def pages(self, layer: int) -> LayerPages:
        kind = self.kind or BLOCK_FLOAT
        return LayerPages(self.layers[layer], self.tables[0], self.tables[1], kind, kind)


def random_kv(
    kind: PackedKind | None, contexts: list[int], layers: int, kv_heads: int, head_dim: int, tail: int = TAIL
) -> KvMemory:
    """KV of sequences with so many packed tokens each, pages of all of them in random order, on the current GPU.

    Behind them stand `tail` plain ones, at most 32.
    """
    packed = [context // GROUP_TOKENS for context in contexts]
    packed_units, plain_units = page_bytes(kind, head_dim) // _UNIT, page_bytes(None, head_dim) // _UNIT
    total, rows = sum(packed), len(contexts)
    units = 2 * total * packed_units + 2 * rows * plain_units
    memory = torch.zeros((layers, kv_heads, units * _UNIT), dtype=torch.uint8, device="cuda")
    packed_end = 2 * total * packed_units * _UNIT
    pattern = random_pages(kind, head_dim, _PATTERN_PAGES, "cuda")
    for layer in memory:
        pages = layer[:, :packed_end].view(kv_heads, 2 * total, -1)
        for start in range(0, 2 * total, _PATTERN_PAGES):
            part = pages[:, start : start + _PATTERN_PAGES]
            part.copy_(pattern[: part.shape[1]])
        layer[:, packed_end:].view(torch.bfloat16).normal_()
    tables = torch.zeros((2, rows, max(packed) + 1), dtype=torch.int32, device="cuda")
    order = (torch.randperm(2 * total, device="cuda") * packed_units).int().view(2, total)
    at = 0
    for row, count in enumerate(packed):
        tables[:, row, :count] = order[:, at : at + count]
        last = 2 * total * packed_units + 2 * row * plain_units
        tables[0, row, count], tables[1, row, count] = last, last + plain_units
        at += count
    length = torch.tensor([GROUP_TOKENS * count + tail for count in packed], dtype=torch.int32, device="cuda")
    stored = torch.tensor(packed, dtype=torch.int32, device="cuda")
    read = 2 * kv_heads * _UNIT * (total * packed_units + rows * plain_units)
    return KvMemory(memory.view(torch.int32), tables, kind, stored if kind else torch.zeros_like(stored), length, read)


def random_pages(kind: PackedKind | None, head_dim: int, count: int, device: str) -> torch.Tensor:
    """uint8 [count, page bytes] of random elements under ordinary scales."""
    size, elements = page_bytes(kind, head_dim), GROUP_TOKENS * head_dim
    if kind is None:
        return torch.randn(count, size // 2, device=device).bfloat16().view(torch.uint8)
    pages = torch.randint(0, 256, (count, size), dtype=torch.uint8, device=device)
    scales = pages[:, elements:]
    if kind in (INTEGER, FP8):
        scales.copy_((0.01 * torch.rand(count, GROUP_TOKENS, device=device)).view(torch.uint8))
    elif kind == CODED_INTEGER:
        # E4M3 codes of 1/2 to 15/8, and the page's own float32 as often as fills a unit of an address.
        scales[:, :-_UNIT].random_(0x30, 0x40)
        whole = 0.01 * torch.rand(count, 1, device=device)
        scales[:, -_UNIT:] = whole.expand(-1, _UNIT // 4).contiguous().view(torch.uint8)
    else:
        scales.random_(118, 130)
    return pages


def imbalanced(batch: int, context: int) -> list[int]:
    """As many tokens as a balanced batch, one sequence with half of them (256 to 32k tokens each)."""
    total = batch * context
    longest = min(total // 2, 32768)
    rest = max(GROUP_TOKENS, (total - longest) // max(1, batch - 1) // GROUP_TOKENS * GROUP_TOKENS)
    return [longest] + [rest] * (batch - 1)
