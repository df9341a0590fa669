"""Attention of one decode step on a device: what lies in its memory, and the three launches of a layer and a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.kernels.launch import nvidia
from hma_serve.decode.kernels.page_kinds import PackedKind
from hma_serve.decode.kernels.page_sharing import merge, number_pages
from hma_serve.decode.kernels.paged_decode import attend

HEADS_AT_ONCE: Final = 8
"""Query heads of a KV head at most: the columns of one tensor-core product."""

HEAD_DIMS: Final = (32, 64, 128)
"""Channels whose scales a lane loads as one, two, four or eight words at a time."""

_TILES = 2
"""Tensor-core products that share a page's loaded and converted bytes when several query tokens are read together.

A further one costs a third of what a page costs with one; three are no faster than two, four do not fit."""

_REGISTERS: Final = {1: 128, 2: 255, 3: 255}
"""Of a thread, by such products: with fewer the loop over packed pages spills, which costs more than the programs that
a multiprocessor gains."""

_FILE_WORDS = 65536
"""Registers of a multiprocessor."""

_MERGES = ((16, 32, 128, 4), (64, 32, 64, 1), (256, 64, 32, 1), (1 << 31, 128, 8, 1))
"""Up to so many (row, KV head)s: channels and parts that a program of `merge` looks at, and its warps.

The fewer there are, the more programs of `attend` share each of them. Wider ones need fewer round trips, but together
they must leave the next kernel room to begin."""

_CHUNK = 64


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a captured graph is fixed to.

    Attributes:
        rows: Query tokens; a sequence's length may be 0, then the row is left alone.
        kv_heads: KV heads.
        group: Query heads of a KV head, at most 8.
        head_dim: Of `HEAD_DIMS`.
        programs: Warps that share the work: a fixed number, whatever the lengths are.
        least: Pages that a program takes at least.
        queries: Query tokens of a sequence that are read together at most; see `queries_at_once`.
    """

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    programs: int
    least: int = 2
    queries: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.group <= HEADS_AT_ONCE or self.head_dim not in HEAD_DIMS:
            raise ValueError(f"{self.group} query heads of {self.head_dim} channels a KV head are not supported")
        if not 0 < self.queries <= queries_at_once(self.group, max(_REGISTERS)):
            raise ValueError(f"{self.queries} query tokens of {self.group} heads cannot be read together")

    @property
    def columns(self) -> int:
        """Query heads of all tokens that are read together."""
        return self.queries * self.group

    @property
    def tiles(self) -> int:
        """Tensor-core products that hold them."""
        return -(-self.columns // HEADS_AT_ONCE)


def queries_at_once(group: int, tiles: int = _TILES) -> int:
    """Query tokens of so many heads a KV head that so many products hold, at most three."""
    return tiles * HEADS_AT_ONCE // group


def warps_at_once(group: int, queries: int) -> int:
    """Programs of `attend` that run on a multiprocessor at once."""
    tiles = -(-queries * group // HEADS_AT_ONCE)
    return _FILE_WORDS // (32 * _REGISTERS[tiles])


def together(count: int, queries: int) -> list[int]:
    """`StepRows.more` of consecutive query tokens of a sequence, at most `queries` of which are read together."""
    blocks = (min(queries, count - start) for start in range(0, count, queries))
    return [each for size in blocks for each in (size - 1, *range(-1, -size, -1))]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, in device memory: change the tensors between steps, never replace them.

    Attributes:
        slot: int32 [rows], whose page table a row reads.
        packed: int32 [rows], packed pages at the front of that table.
        length: int32 [rows], tokens that the row sees, its own included; 0: nothing to do.
        kind: int32 [rows], which `AttentionWork` it belongs to.
        more: int32 [rows], how many of the rows behind it, the next tokens of its sequence, are read together with it
            (see `together`); below 0: it is read with the row that stands so many before.
    """

    slot: torch.Tensor
    packed: torch.Tensor
    length: torch.Tensor
    kind: torch.Tensor
    more: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> StepRows:
        """All of length 0."""
        return cls(*torch.zeros((5, rows), dtype=torch.int32, device=device))


class PartMemory:
    """What programs leave of the (row, head)s that they share, until `merge` adds it up; kernels use it in turn.

    Args:
        programs: Of `attend`.
        columns: Of a block.
        head_dim: Channels.
        device: Where.
    """

    def __init__(self, programs: int, columns: int, head_dim: int, device: torch.device | str) -> None:
        padded = -(-columns // HEADS_AT_ONCE) * HEADS_AT_ONCE
        self.sums = torch.full((2 * programs, columns, head_dim), torch.nan, device=device)
        self.masses = torch.full((2 * programs, 2, padded), torch.nan, device=device)


class AttentionWork:
    """How the pages of the rows of one kind are shared among programs.

    Args:
        shape: Of the step.
        rows: The step's.
        kind: Rows of other kinds are left alone.
        device: Where.
        parts: Made for the shape's programs, columns and head_dim; None: its own.
    """

    def __init__(
        self,
        shape: AttentionShape,
        rows: StepRows,
        kind: int,
        device: torch.device | str,
        parts: PartMemory | None = None,
    ) -> None:
        self.shape = shape
        self.rows = rows
        self.kind = kind
        self._first = torch.zeros(shape.rows + 1, dtype=torch.int32, device=device)
        self._begin = torch.zeros(shape.programs + 1, dtype=torch.int32, device=device)
        self._row = torch.zeros(shape.programs, dtype=torch.int32, device=device)
        self._shared = torch.zeros((2, shape.rows, shape.kv_heads), dtype=torch.int32, device=device)
        self._parts = parts or PartMemory(shape.programs, shape.columns, shape.head_dim, device)

    def number(self) -> None:
        """Once a step, when the lengths stand."""
        shape = self.shape
        number_pages[(triton.cdiv(max(shape.programs + 1, shape.rows * shape.kv_heads), _CHUNK),)](
            self.rows.length,
            self.rows.more,
            self.rows.kind,
            self._first,
            self._begin,
            self._row,
            self._shared,
            shape.rows,
            shape.programs,
            shape.least,
            self.kind,
            KV=shape.kv_heads,
            ROWS=max(16, triton.next_power_of_2(shape.rows)),
            CHUNK=_CHUNK,
            num_warps=4,
        )

    def attend(
        self,
        query: QueryOperand,
        pages: LayerPages,
        out: torch.Tensor,
        *,
        scale: float,
        ptx: bool = True,
        overlap: bool = False,
    ) -> None:
        """One layer.

        Args:
            query: As `hma_serve.decode.kernels.project` leaves it.
            pages: The layer's memory.
            out: [rows, heads, head_dim], float32 or bfloat16; rows of length 0 stay as they are.
            scale: Of scores.
            ptx: False runs the twins in plain Triton.
            overlap: Launch while the kernel before still runs (programmatic dependent launch).
        """
        shape, k, v = self.shape, pages.k_kind, pages.v_kind
        attend[(shape.programs,)](
            query.f16.view(torch.int32),
            query.bf16.view(torch.int32),
            query.factor,
            query.offset if query.offset is not None else query.factor,
            pages.memory,
            pages.k_table,
            pages.v_table,
            self.rows.slot,
            self.rows.packed,
            self.rows.length,
            self.rows.more,
            self._first,
            self._begin,
            self._row,
            out,
            self._parts.sums,
            self._parts.masses,
            scale * math.log2(math.e),
            pages.k_table.stride(0),
            pages.memory.stride(0),
            KV=shape.kv_heads,
            G=shape.group,
            D=shape.head_dim,
            QUERIES=shape.queries,
            K_ELEMENTS=k.elements,
            K_SCALES=k.scales,
            V_ELEMENTS=v.elements,
            V_SCALES=v.scales,
            OFFSET=query.offset is not None,
            PTX=ptx,
            num_warps=1,
            num_stages=1,
            **nvidia(ptx, early=overlap, registers=_REGISTERS[shape.tiles]),
        )
        pairs = shape.rows * shape.kv_heads
        _, channels, parts, warps = next(each for each in _MERGES if pairs <= each[0])
        channels = min(channels, shape.head_dim & -shape.head_dim)
        merge[(shape.rows, shape.kv_heads * shape.group, shape.head_dim // channels)](
            self._shared,
            self.rows.more,
            out,
            self._parts.sums,
            self._parts.masses,
            KV=shape.kv_heads,
            G=shape.group,
            D=shape.head_dim,
            QUERIES=shape.queries,
            PARTS=parts,
            CHANNELS=channels,
            PTX=ptx,
            num_warps=warps,
            **nvidia(ptx, early=overlap),
        )


@dataclass(frozen=True, slots=True)
class QueryOperand:
    """Queries as the kernel multiplies them.

    Attributes:
        f16: float16 [rows, heads, head_dim]: each head times a power of two that brings it near 2^8.
        bf16: bfloat16, the same shape, as they are.
        factor: float32 [rows, heads], what undoes that power.
        offset: float32 [rows, heads], q . c of the packed keys' offset; None: there is none.
    """

    f16: torch.Tensor
    bf16: torch.Tensor
    factor: torch.Tensor
    offset: torch.Tensor | None = None

    @classmethod
    def of(cls, q: torch.Tensor, k_offset: torch.Tensor | None = None) -> QueryOperand:
        """From bfloat16 [rows, heads, head_dim] and float32 [kv_heads, head_dim], by torch: for tests and benches."""
        wide = q.float()
        largest = wide.abs().amax(-1).clamp(min=2.0**-100)
        power = torch.exp2(8 - torch.floor(torch.log2(largest)))
        offset = None
        if k_offset is not None:
            offset = (wide.unflatten(1, (len(k_offset), -1)) * k_offset[:, None]).sum(-1).flatten(1).contiguous()
        return cls((wide * power[..., None]).half(), q.contiguous(), 1 / power, offset)


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's KV memory in fragment order.

    Attributes:
        memory: int32 [kv_heads, words].
        k_table: int32 [slots, pages of a sequence]: addresses of its keys' pages in units of 16 bytes from the start
            of a head's memory, packed ones first.
        v_table: The same for values, with the same strides.
        k_kind: What a packed key page holds.
        v_kind: What a packed value page holds.
    """

    memory: torch.Tensor
    k_table: torch.Tensor
    v_table: torch.Tensor
    k_kind: PackedKind
    v_kind: PackedKind


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // GROUP_TOKENS)
