"""Attention of one decode step on a device: what lies in its memory, and the three launches of a layer and a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.decode.kernels.page_kinds import PackedKind
from hma_serve.decode.kernels.paged_decode import attend, merge, number_pages

HEADS_AT_ONCE: Final = 8
"""Query heads of a KV head at most: the columns of one tensor-core product."""

_MERGES = ((128, 32, 128, 4), (512, 64, 64, 4), (2048, 128, 32, 4), (1 << 31, 128, 16, 2))
"""Up to so many (row, head)s: channels and parts that a program of `merge` looks at, and its warps.

The fewer there are, the more programs of `attend` share each of them."""

_CHUNK = 64


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a captured graph is fixed to.

    Attributes:
        rows: Query tokens; a sequence's length may be 0, then the row is left alone.
        kv_heads: KV heads.
        group: Query heads of a KV head, at most 8.
        head_dim: A multiple of 32.
        programs: Warps that share the work: a fixed number, whatever the lengths are.
        least: Pages that a program takes at least.
    """

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    programs: int
    least: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.group <= HEADS_AT_ONCE or self.head_dim % 32:
            raise ValueError(f"{self.group} query heads of {self.head_dim} channels a KV head are not supported")


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, in device memory: change the tensors between steps, never replace them.

    Attributes:
        slot: int32 [rows], whose page table a row reads.
        packed: int32 [rows], packed pages at the front of that table.
        length: int32 [rows], tokens that the row sees, its own included; 0: nothing to do.
        kind: int32 [rows], which `AttentionWork` it belongs to.
    """

    slot: torch.Tensor
    packed: torch.Tensor
    length: torch.Tensor
    kind: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> StepRows:
        """All of length 0."""
        return cls(*torch.zeros((4, rows), dtype=torch.int32, device=device))


class AttentionWork:
    """How the pages of the rows of one kind are shared among programs, and the parts that these leave.

    Args:
        shape: Of the step.
        rows: The step's.
        kind: Rows of other kinds are left alone.
        device: Where.
    """

    def __init__(self, shape: AttentionShape, rows: StepRows, kind: int, device: torch.device | str) -> None:
        self.shape = shape
        self.rows = rows
        self.kind = kind
        self._first = torch.zeros(shape.rows + 1, dtype=torch.int32, device=device)
        self._begin = torch.zeros(shape.programs + 1, dtype=torch.int32, device=device)
        self._row = torch.zeros(shape.programs, dtype=torch.int32, device=device)
        self._shared = torch.zeros((2, shape.rows, shape.kv_heads), dtype=torch.int32, device=device)
        self._part = torch.full((2 * shape.programs, shape.group, shape.head_dim), torch.nan, device=device)
        self._part_ml = torch.full((2 * shape.programs, 2, HEADS_AT_ONCE), torch.nan, device=device)

    def number(self) -> None:
        """Once a step, when the lengths stand."""
        shape = self.shape
        number_pages[(triton.cdiv(max(shape.programs + 1, shape.rows * shape.kv_heads), _CHUNK),)](
            self.rows.length,
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
        max_registers: int = 128,
        overlap: bool = False,
    ) -> None:
        """One layer.

        Args:
            query: As `hma_serve.decode.kernels.project` leaves it.
            pages: The layer's memory.
            out: [rows, heads, head_dim], float32 or bfloat16; rows of length 0 stay as they are.
            scale: Of scores.
            ptx: False runs the twins in plain Triton.
            max_registers: Of a thread: 128 lets 16 warps run on a multiprocessor.
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
            self._first,
            self._begin,
            self._row,
            out,
            self._part,
            self._part_ml,
            scale * math.log2(math.e),
            pages.k_table.stride(0),
            pages.memory.stride(0),
            KV=shape.kv_heads,
            G=shape.group,
            D=shape.head_dim,
            K_ELEMENTS=k.elements,
            K_SCALES=k.scales,
            V_ELEMENTS=v.elements,
            V_SCALES=v.scales,
            OFFSET=query.offset is not None,
            PTX=ptx,
            num_warps=1,
            num_stages=1,
            maxnreg=max_registers,
            launch_pdl=overlap,
        )
        outputs = shape.rows * shape.kv_heads * shape.group
        _, channels, parts, warps = next(each for each in _MERGES if outputs <= each[0])
        channels = min(channels, shape.head_dim & -shape.head_dim)
        merge[(shape.rows, shape.kv_heads * shape.group, shape.head_dim // channels)](
            self._shared,
            out,
            self._part,
            self._part_ml,
            KV=shape.kv_heads,
            G=shape.group,
            D=shape.head_dim,
            PARTS=parts,
            CHANNELS=channels,
            PTX=ptx,
            num_warps=warps,
            launch_pdl=overlap,
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
