"""What stands between a decode step's products, against float64: outputs poisoned first, all other memory watched.

A product comes in parts, as `skinny` leaves it. The kernels round to BF16 where the model does, three to four times,
and the reference nowhere; the interpreter cuts where a GPU rounds to the nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from hma_serve.decode.kernels.elementwise import embed, gate, project, residual_norm
from hma_serve.decode.kernels.page_orders import fragment_page
from hma_serve.decode.page_order import Role
from hma_serve.model.rotary import rotary_table

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUND = 5e-3 if ON_GPU else 1.5e-2
"""Relative L2 error."""

_EPS = 1e-6
_KV_HEADS = 2
_SENTINEL = 7.0
_POSITIONS = 512


def _product(parts: int, rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A product in parts, and what it is in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(parts, rows, width, generator=generator)
    found = found.bfloat16() if parts == 1 else found / math.sqrt(parts)
    return found.to(DEVICE), found.double().sum(0)


def _poisoned(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(size, torch.nan, dtype=dtype, device=DEVICE)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def _gain(width: int) -> torch.Tensor:
    return (1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(width))).bfloat16()


def norm_error(rows: int, width: int, parts: int, *, ptx: bool) -> float:
    """Of `residual_norm`: the residual and its norm; the sum of no parts is the residual alone."""
    hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    # A row whose mean square is near eps, alone.
    hidden[-1] *= 1e-3
    delta, added = _product(max(1, parts), rows, width, 2)
    gain, out, residual = _gain(width), _poisoned(rows, width), hidden.clone().to(DEVICE)
    residual_norm[(rows,)](
        residual, delta, gain.to(DEVICE), out, _EPS,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PARTS=parts, PTX=ptx, num_warps=16,
    )  # fmt: skip
    total = hidden.double() + (added if parts else 0)
    normed = total * torch.rsqrt((total**2).mean(-1, keepdim=True) + _EPS) * gain.double()
    return max(_error(residual, total), _error(out, normed))


def gate_error(rows: int, width: int, *, ptx: bool) -> float:
    """Of `gate`."""
    up, added = _product(1, rows, 2 * width, 3)
    out = _poisoned(rows, width)
    gate[(rows, triton.cdiv(width, 1024))](up, out, WIDTH=width, BLOCK=1024, PTX=ptx)
    first, second = added.chunk(2, -1)
    return _error(out, torch.nn.functional.silu(first) * second)


def embed_error(rows: int, width: int) -> float:
    """Of `embed`, which is exact: infinite if an element differs."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(50, width, generator=generator).bfloat16()
    drawn = torch.randint(0, 50, (rows,), generator=generator)
    token = torch.where(torch.arange(rows) % 2 == 0, drawn, -1 - torch.arange(rows).flip(0))
    out = _poisoned(rows, width)
    embed[(rows, triton.cdiv(width, 1024))](
        token.int().to(DEVICE), drawn.to(DEVICE), table.to(DEVICE), out, WIDTH=width, BLOCK=1024
    )
    expected = table[torch.where(token >= 0, token, drawn.flip(0))]
    return 0.0 if torch.equal(out.cpu(), expected) else math.inf


@dataclass(frozen=True)
class Projection:
    """One case of `project`; the second of several rows has length 0 and is left alone."""

    rows: int
    group: int
    head_dim: int
    parts: int = 1
    offset: bool = False

    def run(self, *, ptx: bool) -> float:
        """The largest relative error of queries, their scaled copies, offsets, keys and values.

        Infinite if memory changed that is not a live row's token.
        """
        rows, group, dim, heads = self.rows, self.group, self.head_dim, _KV_HEADS * self.group
        generator = torch.Generator().manual_seed(rows * 100 + group)
        qkv, exact = _product(self.parts, rows, (group + 2) * _KV_HEADS * dim, 5)
        length = torch.randint(1, _POSITIONS, (rows,), generator=generator)
        if rows > 1:
            length[1] = 0
        live = length > 0
        offsets = torch.randn(_KV_HEADS, dim, generator=generator)
        q_gain, k_gain, cos_sin = (
            _gain(dim),
            _gain(dim).flip(0),
            rotary_table(dim, 1e6, _POSITIONS, torch.device("cpu")),
        )
        units = 4 * dim  # Of 16 bytes, of a plain page.
        # Page 0 is nobody's: what an entry that was not asked for leads to.
        places = (1 + torch.randperm(2 * rows, generator=generator).view(2, rows)) * units
        tables = torch.zeros(2, rows, _POSITIONS // 32, dtype=torch.int32)
        slot = torch.randperm(rows, generator=generator)
        for row in range(rows):
            tables[:, slot[row], (length[row] - 1) // 32] = places[:, row].int()
        memory = torch.full((_KV_HEADS, (2 * rows + 1) * units * 8), _SENTINEL, dtype=torch.bfloat16, device=DEVICE)
        f16, bf16 = _poisoned(rows, heads, dim, dtype=torch.float16), _poisoned(rows, heads, dim)
        # One row more than there are: the last head's factors must not run into what is behind them.
        factor, q_offset = (_poisoned(rows + 1, heads, dtype=torch.float32) for _ in "fo")
        k_table, v_table = tables.to(DEVICE)
        project[(rows, _KV_HEADS)](
            qkv, q_gain.to(DEVICE), k_gain.to(DEVICE), cos_sin.to(DEVICE), f16, bf16, factor, q_offset,
            offsets.to(DEVICE), memory, k_table, v_table, slot.int().to(DEVICE), length.int().to(DEVICE), _EPS,
            k_table.stride(0), memory.stride(0),
            KV=_KV_HEADS, G=group, D=dim, HEADS=triton.next_power_of_2(group), OFFSET=self.offset, PARTS=self.parts,
            PTX=ptx, num_warps=4,
        )  # fmt: skip
        of_heads = exact.view(rows, -1, dim)
        q, k, v = of_heads[:, :heads], of_heads[:, heads : heads + _KV_HEADS], of_heads[:, heads + _KV_HEADS :]
        turn = cos_sin[(length - 1).clamp(min=0)].double()
        q, k = _turned(q, q_gain, turn), _turned(k, k_gain, turn)
        stored = _Stored(memory.cpu(), dim)
        keys = torch.stack([stored.take(Role.K, int(places[0, row]), int(length[row]) - 1) for row in range(rows)])
        values = torch.stack([stored.take(Role.V, int(places[1, row]), int(length[row]) - 1) for row in range(rows)])
        errors = [
            _error(bf16[live], q[live]),
            _error(f16[live].double() * factor[:rows][live].double()[..., None], q[live]),
            _error(keys[live], k[live]),
            _error(values[live], v[live]),
        ]
        if self.offset:
            along = (q.view(rows, _KV_HEADS, group, dim) * offsets.double()[:, None]).sum(-1).flatten(1)
            errors.append(_error(q_offset[:rows][live], along[live]))
        untouched = torch.isnan(bf16[~live]).all() and (stored.rest() == _SENTINEL).all()
        untouched &= torch.isnan(factor[rows]).all() and torch.isnan(q_offset[rows]).all()
        return max(errors) if untouched else math.inf


def _turned(x: torch.Tensor, gain: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Normed, then rotated: float64 [rows, heads, D]."""
    x = x * torch.rsqrt((x**2).mean(-1, keepdim=True) + _EPS) * gain.double()
    (low, high), (cos, sin) = x.chunk(2, -1), turn[:, None].chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class _Stored:
    """What lies in plain pages; what is taken is sentinel again, so that the rest can be looked at."""

    def __init__(self, memory: torch.Tensor, head_dim: int) -> None:
        self._pages = memory.view(_KV_HEADS, -1, 32 * head_dim)
        self._head_dim = head_dim

    def take(self, role: Role, place: int, position: int) -> torch.Tensor:
        """One token's keys or values [KV heads, D]; of no token, what is there."""
        order = fragment_page("bf16", role, self._head_dim)
        page = self._pages[:, place // (4 * self._head_dim)]
        wire = order.restore(page.contiguous().view(torch.uint8)).view(torch.bfloat16)
        tokens = wire.view(_KV_HEADS, 32, self._head_dim)
        found = tokens[:, position % 32].clone()
        if position >= 0:
            tokens[:, position % 32] = _SENTINEL
            page.copy_(order.arrange(wire.view(torch.uint8)).view(torch.bfloat16))
        return found

    def rest(self) -> torch.Tensor:
        """All that was not taken."""
        return self._pages


WIDTHS = (2560, 4096, 5120)
"""Of Qwen3's hidden states; a norm's block is the power of two above."""

INNER = (9728, 12288, 17408)

PROJECTIONS = [
    Projection(rows, group, dim, parts, offset)
    for rows in (1, 7, 128)
    for group in (4, 5, 8)
    for dim in (64, 128)
    for parts, offset in ((1, False), (1, True), (4, True), (6, False))
]


def main() -> None:
    """A corner of the grid, in the interpreter."""
    errors = {
        "embed": embed_error(3, 1100),
        "norm alone": norm_error(2, 96, 0, ptx=False),
        "residual, one part": norm_error(2, 2560, 1, ptx=False),
        "residual, three parts": norm_error(3, 160, 3, ptx=False),
        "gate": gate_error(2, 1100, ptx=False),
    }
    for case in (
        Projection(3, 4, 128, 4, True),
        Projection(3, 5, 64),
        Projection(2, 8, 128, 1, True),
        Projection(1, 2, 32, 2),
    ):
        errors[str(case)] = case.run(ptx=False)
    for name, error in errors.items():
        print(f"{error:.2e} (at most {BOUND:.1e}) {name}")
    bad = [name for name, error in errors.items() if not error <= BOUND]
    assert not bad, bad


if __name__ == "__main__":
    main()
