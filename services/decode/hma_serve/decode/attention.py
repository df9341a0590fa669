"""Attention over mixed pages, on any device that torch knows: the reference that every faster kernel is held to.

A sequence's tokens are, in order, *packed* groups (the codec's own bytes, read here and never kept decoded) and *plain*
pages (tokens that decode computed). One step mixes sequences that bring one query token with sequences that bring
several; the former are computed together whatever their lengths are, because on a CPU a step's cost is mostly the
number of operations.

How: the softmax needs all scores of a sequence, which are few, but never all keys or values. So pages are read in
blocks that fit a cache, once for the scores and once for the values, and every page of every sequence is one small
matrix product in a batch. Sequences of any lengths meet without padding: a page knows its owner, and maxima, sums and
outputs are gathered by owner. Masks touch only pages that hold something after a query, which a block has at its end.

All arithmetic after reading is float32. Memory: the scores of one layer, and one block of decoded pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import Need, PagePool, Reservation
from hma_serve.kvblock import channel_order
from hma_serve.model import Attention
from hma_serve.quant import codec
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED

BLOCK_BYTES = 1 << 20
"""Decoded bytes of keys (or values) that are in hand at once; about half of a core's second-level cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """One sequence's share of a step: the tokens whose KV is computed, in order.

    Attributes:
        pages: Where its KV lies; the packed part is complete.
        start: Position of the first query token in the sequence, at or after the packed part.
        count: Query tokens.
    """

    pages: Reservation
    start: int
    count: int

    @property
    def packed_tokens(self) -> int:
        """Tokens before the plain pages."""
        return self.pages.need.packed_groups * GROUP_TOKENS

    @property
    def plain_start(self) -> int:
        """Index of the first query token among the plain tokens."""
        return self.start - self.packed_tokens

    @property
    def plain_groups(self) -> int:
        """Plain pages that hold something once the queries' own KV is written."""
        return -(-(self.plain_start + self.count) // GROUP_TOKENS)


class PagedAttention(Protocol):
    """What the step runner needs of an attention over pages: one plan per step, called once per layer."""

    def plan(self, spans: Sequence[Span]) -> Attention:
        """Prepares a step.

        Args:
            spans: In the order of the step's tokens; their pages must not change hands before the step is over.

        Returns:
            The model's attention for this step: writes K and V of the step's tokens into their plain pages, then
            attends each token to all tokens of its sequence up to itself.
        """
        ...


class TorchPagedAttention:
    """`PagedAttention` in plain torch operations.

    Args:
        pool: The pages.
        heads: Query heads of the model.
        k_offsets: What packed keys have been moved by, float32 [layers, kv_heads, head_dim] in the producer's order of
            channels; None: nothing. Plain pages hold keys as they are.
    """

    def __init__(self, pool: PagePool, heads: int, k_offsets: torch.Tensor | None = None) -> None:
        self._pool = pool
        self._k_offsets = k_offsets
        geometry = pool.geometry
        self._kv_heads = geometry.kv_heads
        self._head_dim = geometry.head_dim
        self._group = heads // geometry.kv_heads
        decoded = geometry.kv_heads * GROUP_TOKENS * geometry.head_dim * 4
        self._block_pages = max(1, BLOCK_BYTES // decoded)
        self._tables: dict[tuple[Reservation, ...], _Tables] = {}

    def plan(self, spans: Sequence[Span]) -> Attention:
        """See `PagedAttention`."""
        groups, row = [], 0
        for single, members in groupby(spans, key=lambda span: span.count == 1):
            for batch in [list(members)] if single else [[span] for span in members]:
                groups.append(_Group(row, batch, self._tables_of(batch)))
                row += sum(span.count for span in batch)
        self._forget(groups)
        return _Step(self._pool, groups, _write_addresses(spans), self._group, self._k_offsets)

    def _tables_of(self, batch: list[Span]) -> _Tables:
        """Page tables change once in 32 steps, so those of the last step are kept."""
        known = self._tables.get(tuple(span.pages for span in batch))
        if known is not None and known.extents == [_extent(span) for span in batch]:
            return known
        return _Tables(batch, self._block_pages)

    def _forget(self, groups: list[_Group]) -> None:
        self._tables = {tuple(span.pages for span in group.spans): group.tables for group in groups}


class _Form(NamedTuple):
    """What decides how packed pages are read; see `Need`."""

    k_format: str
    v_format: str
    interleaved: bool
    offset: bool

    @classmethod
    def of(cls, need: Need) -> _Form:
        return cls(need.k_format, need.v_format, need.interleaved, need.offset)


@dataclass(frozen=True, slots=True)
class _Block:
    """Pages of one kind that are read together.

    Attributes:
        form: What packed pages hold; None: plain pages.
        k_pages: int64 [n].
        v_pages: int64 [n].
        owner: int64 [n], the row of the group that each page belongs to.
        place: int64 [n], owner * slots + the page's number in its row.
        starts: int64 [m], for the last m pages: index of each one's first token among its row's plain tokens. Only
            these may hold tokens that a query must not see.
    """

    form: _Form | None
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    owner: torch.Tensor
    place: torch.Tensor
    starts: torch.Tensor


class _Tables:
    """Which pages a batch of sequences reads, in blocks."""

    def __init__(self, batch: list[Span], block_pages: int) -> None:
        self.extents = [_extent(span) for span in batch]
        self.slots = max(span.pages.need.packed_groups + span.plain_groups for span in batch)
        self.blocks: list[_Block] = []
        self._block_pages = block_pages
        packed: dict[_Form, list[int]] = {}
        for row, span in enumerate(batch):
            need = span.pages.need
            if need.packed_groups:
                packed.setdefault(_Form.of(need), []).append(row)
        for form, rows in packed.items():
            owner, group = _owners(rows, [batch[row].pages.need.packed_groups for row in rows])
            k_pages = torch.cat([batch[row].pages.packed_k for row in rows])
            v_pages = torch.cat([batch[row].pages.packed_v for row in rows])
            places = owner * self.slots + group
            self._add(_Block(form, k_pages, v_pages, owner, places, places[:0]))
        self._add_plain(batch)

    def _add_plain(self, batch: list[Span]) -> None:
        owner, group = _owners(range(len(batch)), [span.plain_groups for span in batch])
        packed = torch.tensor([span.pages.need.packed_groups for span in batch])
        seen_whole = group < torch.tensor([span.plain_start // GROUP_TOKENS for span in batch])[owner]
        order = torch.cat([seen_whole.nonzero(), (~seen_whole).nonzero()]).squeeze(1)
        k_pages = torch.cat([span.pages.plain_k[: span.plain_groups] for span in batch])[order]
        v_pages = torch.cat([span.pages.plain_v[: span.plain_groups] for span in batch])[order]
        owner, group = owner[order], group[order]
        places = owner * self.slots + packed[owner] + group
        starts = (group * GROUP_TOKENS)[int(seen_whole.sum()) :]
        self._add(_Block(None, k_pages, v_pages, owner, places, starts))

    def _add(self, whole: _Block) -> None:
        """Cuts pages of one kind into blocks."""
        count, masked_from = len(whole.owner), len(whole.owner) - len(whole.starts)
        for first in range(0, count, self._block_pages):
            part = slice(first, first + self._block_pages)
            masked = slice(max(0, first - masked_from), max(0, first + self._block_pages - masked_from))
            self.blocks.append(
                _Block(
                    whole.form,
                    whole.k_pages[part],
                    whole.v_pages[part],
                    whole.owner[part],
                    whole.place[part],
                    whole.starts[masked],
                )
            )


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with the same number of query tokens, computed together.

    Attributes:
        row: First of the step's tokens.
        spans: The sequences.
        tables: Their pages.
    """

    row: int
    spans: list[Span]
    tables: _Tables

    @property
    def queries(self) -> int:
        """Query tokens of each sequence."""
        return self.spans[0].count


class _Step:
    """One step's attention; see `PagedAttention.plan`."""

    def __init__(
        self,
        pool: PagePool,
        groups: list[_Group],
        addresses: _Addresses,
        group_size: int,
        k_offsets: torch.Tensor | None,
    ) -> None:
        self._pool = pool
        self._k_offsets = k_offsets
        self._interleaved = _interleaved(pool.geometry.head_dim, pool.memory.device)
        self._addresses = addresses
        self._group_size = group_size
        self._work = [(group, [_hidden(block, group) for block in group.tables.blocks]) for group in groups]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        plain, addresses = self._pool.plain(layer), self._addresses
        plain[addresses.k_pages, :, addresses.offsets] = k
        plain[addresses.v_pages, :, addresses.offsets] = v
        outputs = []
        scaled = q.float() * q.shape[-1] ** -0.5
        for group, hidden in self._work:
            tokens = len(group.spans) * group.queries
            outputs.append(self._attend(layer, scaled[group.row : group.row + tokens], group, hidden))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(q.dtype)

    def _attend(self, layer: int, q: torch.Tensor, group: _Group, hidden: list[torch.Tensor | None]) -> torch.Tensor:
        """Attends one group; `q` is float32 [rows * queries, heads, head_dim], scaled, as is the result."""
        rows, queries, size = len(group.spans), group.queries, self._group_size
        kv_heads, head_dim = q.shape[1] // size, q.shape[2]
        # Queries that share a KV head become the rows of one matrix.
        q = q.view(rows, queries, kv_heads, size, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows, kv_heads, size * queries, head_dim)
        blocks = group.tables.blocks
        scores = [self._scores(layer, q, block, mask, size) for block, mask in zip(blocks, hidden, strict=True)]
        peaks = _peaks(scores, blocks, rows, group.tables.slots)
        out, sums = torch.zeros_like(q), torch.zeros_like(peaks)
        for block, part in zip(blocks, scores, strict=True):
            weights = part.sub_(_of_owner(peaks, block).unsqueeze(3)).exp_()
            values = torch.matmul(weights, self._values(layer, block))
            if rows > 1:
                sums.index_add_(0, block.owner, weights.sum(3))
                out.index_add_(0, block.owner, values)
            else:
                sums += weights.sum((0, 3))
                out += values.sum(0)
        out /= sums.unsqueeze(3)
        return out.view(rows, kv_heads, size, queries, head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

    def _scores(self, layer: int, q: torch.Tensor, block: _Block, mask: torch.Tensor | None, size: int) -> torch.Tensor:
        """Scores of every page in a block, float32 [n, kv_heads, size * queries, 32]."""
        form = block.form
        if form is None:
            keys = self._pool.plain(layer).index_select(0, block.k_pages).float()
        else:
            keys = self._packed(layer, form.k_format, Role.K, block.k_pages)
            # The inner product does not mind in which order the channels stand, as long as both agree.
            q = q.index_select(3, self._interleaved) if form.interleaved else q
        scores = torch.matmul(_of_owner(q, block), keys.transpose(2, 3))
        if self._k_offsets is not None and form is not None and form.offset:
            scores += _of_owner(torch.matmul(q, self._k_offsets[layer].unsqueeze(2)), block)  # q.c
        if mask is not None:
            last = scores[len(scores) - len(mask) :]
            last.view(*last.shape[:2], size, -1, GROUP_TOKENS).masked_fill_(mask, -torch.inf)
        return scores

    def _values(self, layer: int, block: _Block) -> torch.Tensor:
        if block.form is None:
            return self._pool.plain(layer).index_select(0, block.v_pages).float()
        return self._packed(layer, block.form.v_format, Role.V, block.v_pages)

    def _packed(self, layer: int, page_format: str, role: Role, pages: torch.Tensor) -> torch.Tensor:
        """float32 [n, kv_heads, 32, head_dim]."""
        packed = self._pool.packed(page_format, role, layer).index_select(0, pages)
        return codec(page_format).decode(self._pool.order(page_format, role).restore(packed).unsqueeze(2))


@dataclass(frozen=True, slots=True)
class _Addresses:
    """Where the step's tokens' own KV goes: int64 [tokens] each."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    offsets: torch.Tensor


def _write_addresses(spans: Sequence[Span]) -> _Addresses:
    positions = torch.cat([torch.arange(span.plain_start, span.plain_start + span.count) for span in spans])
    counts = torch.tensor([span.count for span in spans])
    groups = positions // GROUP_TOKENS
    tables = [(span.pages.plain_k[: span.plain_groups], span.pages.plain_v[: span.plain_groups]) for span in spans]
    sizes = torch.tensor([span.plain_groups for span in spans])
    places = (sizes.cumsum(0) - sizes).repeat_interleave(counts) + groups
    k_pages = torch.cat([table[0] for table in tables])[places]
    v_pages = torch.cat([table[1] for table in tables])[places]
    return _Addresses(k_pages, v_pages, positions % GROUP_TOKENS)


def _hidden(block: _Block, group: _Group) -> torch.Tensor | None:
    """Which tokens lie after each query in the block's last m pages, bool [m, 1, 1, queries, 32]; None: nowhere."""
    if not len(block.starts):
        return None
    owner = block.owner[len(block.owner) - len(block.starts) :]
    first = torch.tensor([span.plain_start for span in group.spans])[owner]
    queries = first.unsqueeze(1) + torch.arange(group.queries)
    tokens = block.starts.unsqueeze(1) + torch.arange(GROUP_TOKENS)
    return (tokens.unsqueeze(1) > queries.unsqueeze(2))[:, None, None]


def _peaks(scores: list[torch.Tensor], blocks: list[_Block], rows: int, slots: int) -> torch.Tensor:
    """The largest score of each row, head and query over all of its pages: float32 [rows, kv_heads, queries]."""
    tops = [part.amax(3) for part in scores]
    if rows == 1:
        return torch.stack([top.amax(0) for top in tops]).amax(0, keepdim=True)
    padded = tops[0].new_full((rows * slots, *tops[0].shape[1:]), -torch.inf)
    for block, top in zip(blocks, tops, strict=True):
        padded.index_copy_(0, block.place, top)
    return padded.view(rows, slots, *tops[0].shape[1:]).amax(1)


def _of_owner(rows: torch.Tensor, block: _Block) -> torch.Tensor:
    """For every page of a block, its owner's row."""
    if len(rows) == 1:
        return rows.expand(len(block.owner), *rows.shape[1:])
    return rows.index_select(0, block.owner)


@lru_cache(maxsize=16)
def _interleaved(head_dim: int, device: torch.device) -> torch.Tensor:
    """Where the channels of an interleaved key stand in a half-split one."""
    order = channel_order(head_dim, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    return torch.from_numpy(order).to(device)


def _extent(span: Span) -> tuple[int, int, int]:
    """What decides a span's page table: which plain pages are in use, and from which on a query may not see all."""
    return span.pages.version, span.plain_groups, span.plain_start // GROUP_TOKENS


def _owners(rows: Sequence[int], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For pages laid row after row: the row of each, and its number within the row."""
    sizes = torch.tensor(counts)
    owner = torch.tensor(list(rows)).repeat_interleave(sizes)
    number = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return owner, number
