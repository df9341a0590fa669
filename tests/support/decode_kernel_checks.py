"""Runs the decode step's kernels on random data and compares with float64, or with the model itself; a program.

Triton's interpreter must be chosen before the kernels are imported, and the same checks run on a GPU. There the whole
grid runs, with the kernels' PTX; here a corner of it, with their twins in plain Triton.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.attention import Span, TorchPagedAttention
from hma_serve.decode.gpu_runner import GpuStepRunner
from hma_serve.decode.kernels import attention_call
from hma_serve.decode.kernels.attention_call import AttentionShape, queries_at_once
from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.kernels.matvec import matvec
from hma_serve.decode.kernels.page_orders import fragment_page
from hma_serve.decode.kernels.placing import place
from hma_serve.decode.kernels.skinny import skinny
from hma_serve.decode.kernels.step_model import StepModel
from hma_serve.decode.page_order import PageOrders, Role, page_order
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation
from hma_serve.decode.scheduler import Share
from hma_serve.decode.sequence import Sequence
from hma_serve.model import Transformer, tensor_shapes
from hma_serve.quant import codec
from support.paged_kv import paged_case

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

ATTENTION_ERROR = 3e-3
"""Relative L2 against float64 of the decoded cache: probabilities and outputs are BF16, all else is finer."""

MATERIALISED_ERROR = 5e-3
"""The same where that cache was rounded to BF16 on arrival, which alone moves ordinary attention by 2.7e-3."""

STEP_ERROR = 2e-2 if ON_GPU else 5e-2
"""Relative L2 of logits between two ways to round; the interpreter cuts instead of rounding to BF16."""


MATRICES = [(37, 100), (100, 4096), (6144, 4096), (4096, 12288), (151936, 2560), (5120, 5120)]
"""Outputs and inputs of products of few rows."""


@dataclass(frozen=True)
class AttentionCheck:
    """One point of the grid; sequences are (packed pages, plain tokens), and counts how many of each one's are asked.

    Without counts one token is, and tokens are not read together.
    """

    sequences: list[tuple[int, int]]
    group: int = 4
    head_dim: int = 128
    kv_heads: int = 2
    programs: int = 2112
    k_format: str = "tt_bfp8_b"
    v_format: str = "tt_bfp8_b"
    offset: bool = False
    counts: list[int] | None = None
    tiles: int = 2
    mode: str = "fused"

    @property
    def bound(self) -> float:
        """What its error may be."""
        return ATTENTION_ERROR if self.mode == "fused" else MATERIALISED_ERROR

    def run(self, *, ptx: bool) -> float:
        """The relative error; NaN if anything was not written."""
        rows = sum(self.counts) if self.counts else len(self.sequences)
        queries = queries_at_once(self.group, self.tiles) if self.counts else 1
        shape = AttentionShape(rows, self.kv_heads, self.group, self.head_dim, self.programs, 1, queries)
        case = paged_case(
            shape,
            self.sequences,
            self.counts,
            k_format=self.k_format,
            v_format=self.v_format,
            offset=self.offset,
            materialise=self.mode == "materialise",
            # Scores of ordinary size: keys are rounded to BF16, and the larger the scores, the more that is.
            spread=3 if self.mode == "fused" else 0,
            device=DEVICE,
        )
        kind = torch.bfloat16 if ON_GPU else torch.float32
        out = torch.empty(case.expected.shape, dtype=kind, device=DEVICE)
        case.work.number()
        for poisoned in (out, case.parts.sums, case.parts.masses):
            poisoned.fill_(torch.nan)
        case.work.attend(case.query, case.pages, out, scale=case.scale, ptx=ptx)
        return case.error(out)


_SINGLE = [
    AttentionCheck([(2, 5), (0, 33)], group=4, head_dim=64, kv_heads=1, programs=3, offset=True),
    AttentionCheck([(2, 1)], group=5, head_dim=32, kv_heads=2, programs=7, k_format="int8", v_format="fp8_e4m3fn"),
    AttentionCheck([(1, 40)], group=8, head_dim=32, kv_heads=1, programs=1, k_format="mxfp8_e4m3", v_format="mxint8"),
    AttentionCheck([(2, 3)], group=4, head_dim=64, kv_heads=1, programs=2, k_format="nvfp4", v_format="nvfp4"),
    AttentionCheck([(0, 1), (3, 9), (1, 32), (0, 34)], head_dim=128, kv_heads=1, programs=5, offset=True),
]
_EXTEND = [
    AttentionCheck([(1, 37), (2, 1)], group=4, head_dim=64, kv_heads=1, programs=5, offset=True, counts=[7, 1]),
    AttentionCheck(
        [(0, 34)], group=5, head_dim=32, kv_heads=2, programs=1, k_format="int8", v_format="int8", counts=[4]
    ),
    AttentionCheck([(2, 33)], group=8, head_dim=32, kv_heads=1, programs=9, k_format="fp8_e4m3fn", counts=[4], tiles=3),
    AttentionCheck([(1, 5)], group=5, head_dim=128, kv_heads=1, programs=2, counts=[3]),
]
_MATERIALISED = [
    AttentionCheck(
        [(2, 5), (1, 33)], head_dim=64, kv_heads=1, programs=3, k_format=name, v_format=name, offset=offset,
        mode="materialise",
    )
    for name, offset in (("tt_bfp8_b", True), ("int8", False), ("int4", True), ("nvfp4", False))
]  # fmt: skip
CORNER = {"single": _SINGLE, "extend": _EXTEND, "materialise": _MATERIALISED}


_BALANCED = [(4, 7)] * 8
_IMBALANCED = [(0, 1), (1, 32), (9, 5), (2, 64), (0, 95)]
_ONE_LONG = [(156, 8), *[(0, 1)] * 5, (1, 3)]


def grid() -> list[AttentionCheck]:
    """Shapes, batches and codecs, on a GPU."""
    heads = [
        AttentionCheck(rows, group=group, head_dim=head_dim, offset=rows is _IMBALANCED)
        for group in (4, 5, 8)
        for head_dim in (64, 128)
        for rows in (_BALANCED, _IMBALANCED, _ONE_LONG)
    ]
    batches = [
        AttentionCheck(_uneven(count, 40), programs=programs) for count in (1, 3, 32, 128) for programs in (1, 50, 2112)
    ]
    batches += [AttentionCheck(_uneven(128, 40), kv_heads=8)]
    lengths = [AttentionCheck([(0, length)], kv_heads=8) for length in (1, 31, 32, 33, 1000, 4999)]
    codecs = [
        AttentionCheck(_IMBALANCED, group=group, head_dim=head_dim, k_format=k, v_format=v, offset=head_dim == 64)
        for group in (4, 5, 8)
        for head_dim in (64, 128)
        for k, v in _CODECS
    ]
    materialised = [
        AttentionCheck(
            _BALANCED, head_dim=head_dim, k_format=name, v_format=name, offset=head_dim == 64, mode="materialise"
        )
        for head_dim in (64, 128)
        for name in (*sorted(BYTE_PAGES), "int4")
    ]
    return heads + batches + lengths + codecs + materialised


_CODECS = [*((name, name) for name in sorted(BYTE_PAGES)), ("tt_bfp8_b", "tt_bfp4_b"), ("int8", "fp8_e4m3fn")]
_EVERY_COUNT = [(count % 5, count + 7 * count % 40) for count in range(1, 33)]
_MIXED = [(0, 1), (0, 32), (3, 7), (9, 33), (1, 64), (40, 31)]
_MIXED_COUNTS = [1, 32, 5, 2, 32, 31]


def extend_grid() -> list[AttentionCheck]:
    """The same for several query tokens of a sequence."""
    heads = [
        AttentionCheck(_MIXED, group=group, head_dim=head_dim, offset=offset, counts=_MIXED_COUNTS)
        for group in (4, 5, 8)
        for head_dim in (64, 128)
        for offset in (False, True)
    ]
    every = [
        AttentionCheck(_EVERY_COUNT, group=group, counts=list(range(1, 33)), programs=programs)
        for group in (4, 5)
        for programs in (1, 50, 1320)
    ]
    long = [AttentionCheck([(155, 40), (0, 200)], kv_heads=8, counts=[17, 200])]
    tiles = [
        AttentionCheck(_MIXED, group=group, counts=_MIXED_COUNTS, tiles=count)
        for group in (4, 5, 8)
        for count in (1, 3)
    ]
    codecs = [
        AttentionCheck([(3, 40), (1, 1)], group=group, counts=[21, 1], k_format=k, v_format=v)
        for group in (4, 5, 8)
        for k, v in _CODECS
    ]
    return heads + every + long + tiles + codecs


def _uneven(count: int, most: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(count)
    packed = torch.randint(0, most, (count,), generator=generator).tolist()
    plain = torch.randint(1, 70, (count,), generator=generator).tolist()
    return list(zip(packed, plain, strict=True))


STEP_SHAPES = {"small": (256, 160, 4, 2, 32), "8B": (4096, 12288, 32, 8, 128), "14B": (5120, 17408, 40, 8, 128)}
"""Hidden size, width of the MLP, heads, KV heads and head_dim; two layers of each."""


def step_error(shape: str = "small", *, ptx: bool, one_row: bool = False) -> float:
    """The runner's step of a model over a packed prompt, the end of another, a prompt, and a single token.

    `one_row`: the first of them alone; its products are kernels of their own.
    """
    hidden_size, inner, heads, kv_heads, head_dim = STEP_SHAPES[shape]
    config = ModelConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=inner,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (torch.randn(size, generator=generator) / (size[-1] ** 0.5 if len(size) > 1 else 8)).bfloat16()
        + (1 if len(size) == 1 else 0)
        for name, size in tensor_shapes(config).items()
    }
    sequences = [(1, 3, 1), (1, 30, 11), (0, 0, 3), (0, 0, 1)]  # packed groups, plain tokens there, tokens to compute
    sequences = sequences[:1] if one_row else sequences
    tokens = torch.randint(0, 96, (sum(count for *_, count in sequences),), generator=generator)
    positions = torch.cat([torch.arange(32 * a + b, 32 * a + b + c) for a, b, c in sequences])
    reference = _pool(config, page_order, "cpu")
    spans = _filled(reference, sequences)
    hidden = Transformer(config, weights).forward(
        tokens, positions, TorchPagedAttention(reference, config.num_heads).plan(spans)
    )
    ends = torch.tensor([count for *_, count in sequences]).cumsum(0) - 1
    expected = Transformer(config, weights).logits(hidden[ends]).double()

    pool = _pool(config, fragment_page, DEVICE)
    model = StepModel(config, {name: value.to(DEVICE) for name, value in weights.items()}, ptx=ptx)
    found = _step(model, pool, _filled(pool, sequences), tokens)
    return float((found.cpu().double() - expected).norm() / expected.norm())


def product_error(rows: int, outputs: int, width: int, *, ptx: bool, gated: bool = False) -> float:
    """Of a product of few rows against float64, its parts added; gated: of so many outputs and what they gate."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator)
    matrix = torch.randn((2 if gated else 1) * outputs, width, generator=generator)
    if gated:
        matrix *= 2 * width**-0.5
    if ptx:
        x, matrix = x.bfloat16(), matrix.bfloat16()
    expected = x.double() @ matrix.double().T
    if gated:
        first, second = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(first) * second
    with _poisoned_memory(), _no_device() if not ON_GPU else nullcontext():
        x, matrix = x.to(DEVICE), matrix.to(DEVICE)
        of_one = rows == 1 and not gated
        found = matvec(x, matrix, ptx=ptx) if of_one else skinny(x, matrix, ptx=ptx, gated=gated)
        found = found.cpu().double()
    found = found.view(-1, rows, outputs).sum(0)
    return float((found - expected).norm() / expected.norm())


def many_pairs_error() -> float:
    """Of attention whose parts are added as for more (row, KV head)s than the interpreter can have."""
    check = AttentionCheck([(9, 5), (17, 40)], head_dim=32, kv_heads=1, programs=40)
    with patch.object(attention_call, "_MERGES", attention_call._MERGES[-1:]):
        return check.run(ptx=False)


def misplaced_bytes(page_format: str, role: Role, head_dim: int) -> int:
    """How many of a layer's bytes differ from what `arrange` and a scatter leave there."""
    units = codec(page_format).encode(torch.randn(2, 3 * 32, head_dim, generator=torch.Generator().manual_seed(4)))
    order, page = fragment_page(page_format, role, head_dim), BYTE_PAGES[page_format]
    step = -(-order.page_bytes // 16)
    addresses = torch.tensor([4, 0, 2]) * step
    layer = torch.full((4, 5 * step * 16), 77, dtype=torch.uint8)
    pages = layer.as_strided((4 * step + 1, 4, order.page_bytes), (16, layer.shape[1], 1))
    pages[addresses, 1:3] = order.arrange(units).transpose(0, 1)
    there = torch.full_like(layer, 77, device=DEVICE)
    place(page, role is Role.K, head_dim, units.to(DEVICE), there.as_strided(pages.shape, pages.stride()), addresses, 1)
    return int((there.cpu() != layer).sum())


def _pool(config: ModelConfig, orders: PageOrders, device: str) -> PagePool:
    return PagePool(
        KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim),
        packed_formats=["tt_bfp8_b"],
        plain_dtype=torch.bfloat16,
        capacity_tokens=512,
        orders=orders,
        device=device,
    )


def _filled(pool: PagePool, sequences: list[tuple[int, int, int]]) -> list[Span]:
    """The same KV in any pool: packed prompts, then BF16 tokens."""
    geometry, spans = pool.geometry, []
    generator = torch.Generator().manual_seed(2)
    for groups, there, count in sequences:
        need = Need.of(
            packed_tokens=32 * groups, total_tokens=32 * groups + 64, k_format="tt_bfp8_b", v_format="tt_bfp8_b"
        )
        pages = pool.reserve(need)
        if not _in_fragments(pool):
            # The reference multiplies what nobody has written yet by 0.
            pool.clear(torch.cat([pages.plain_k, pages.plain_v]))
        for layer in range(geometry.layers):
            for role, packed, plain in (
                (Role.K, pages.packed_k, pages.plain_k),
                (Role.V, pages.packed_v, pages.plain_v),
            ):
                if groups:
                    prompt = torch.randn(geometry.kv_heads, 32 * groups, geometry.head_dim, generator=generator)
                    pool.store("tt_bfp8_b", role, layer, packed, slice(None), codec("tt_bfp8_b").encode(prompt))
                tail = torch.zeros(geometry.kv_heads, 32, geometry.head_dim)
                tail[:, :there] = torch.randn(geometry.kv_heads, there, geometry.head_dim, generator=generator)
                _put_plain(pool, role, layer, plain[:1], tail.bfloat16())
        spans.append(Span(pages, 32 * groups + there, count))
    return spans


def _put_plain(pool: PagePool, role: Role, layer: int, page: torch.Tensor, values: torch.Tensor) -> None:
    if not _in_fragments(pool):
        pool.plain(layer)[page] = values
        return
    order = fragment_page("bf16", role, pool.geometry.head_dim)
    laid = order.arrange(values.contiguous().view(torch.uint8).flatten(1)).view(torch.bfloat16)
    pool.plain(layer)[page.to(pool.memory.device)] = laid.view(values.shape).to(pool.memory.device)


def _in_fragments(pool: PagePool) -> bool:
    return type(pool.order("tt_bfp8_b", Role.K)) is type(fragment_page("tt_bfp8_b", Role.K, 32))


def _step(model: StepModel, pool: PagePool, spans: list[Span], tokens: torch.Tensor) -> torch.Tensor:
    """The runner's own step, without a graph; the last token is taken from the step before."""
    with _no_device() if not ON_GPU else nullcontext():
        runner = _EagerRunner(model, pool, step_tokens=len(tokens), sequences=len(spans), max_tokens=256)
        shares = []
        for span, known in zip(spans, torch.split(tokens, [span.count for span in spans]), strict=True):
            carried = min(1, len(spans) - 1) if span is spans[-1] else None
            of_it = [0] * span.start + ([] if carried else known.tolist())
            shares.append(Share(_sequence(span.pages, of_it), span.start, span.count, True, carried))
        runner.drew(torch.tensor([7, int(tokens[-1])])[-len(spans) :])
        return runner.logits(shares)


def _sequence(pages: Reservation, tokens: list[int]) -> Sequence:
    sampling, stop = SamplingParams(), StopConditions()
    return Sequence(0, pages, len(tokens), tokens, 0, sampling, 0, stop, frozenset(), 256, vocab=96)


class _EagerRunner(GpuStepRunner):
    """Runs a step's kernels one by one, so that it can do so in the interpreter."""

    def drew(self, tokens: torch.Tensor) -> None:
        self._last[: len(tokens)] = tokens

    def logits(self, shares: list[Share]) -> torch.Tensor:
        kinds = self._kinds(shares)
        count = sum(share.count for share in shares)
        self._inputs.copy_(self._written(shares, kinds, count))
        run, _ = self._kernels(count, kinds, extends=True)
        return run()[0][: len(shares)]


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """What a kernel is given to write to holds NaN."""
    new = torch.Tensor.new_empty

    def poisoned(like: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return new(like, *args, **options).fill_(torch.nan)

    with patch.object(torch.Tensor, "new_empty", poisoned):
        yield


@contextmanager
def _no_device() -> Iterator[None]:
    """Stands in for what the runner asks of CUDA."""
    properties = SimpleNamespace(multi_processor_count=4)
    with (
        patch.object(torch.Tensor, "pin_memory", lambda self: self),
        patch.object(torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        patch.object(torch.cuda, "get_device_properties", lambda _: properties),
    ):
        yield


def main() -> None:
    """One part in the interpreter: a corner of the grid, or a step and a product."""
    part = sys.argv[1]
    errors: list[tuple[str, float, float]]
    if part == "placing":
        errors = [
            (f"{name}, {role.name}, {head_dim} channels", misplaced_bytes(name, role, head_dim), 0)
            for name in BYTE_PAGES
            for role in Role
            for head_dim in (32, 128)
        ]
    elif part == "step":
        errors = [
            ("step", step_error(ptx=False), STEP_ERROR),
            ("step of one row", step_error(ptx=False, one_row=True), STEP_ERROR),
            *(
                (
                    f"{rows} rows times {shape}{', gated' if gated else ''}",
                    product_error(rows, *shape, ptx=False, gated=gated),
                    ATTENTION_ERROR,
                )
                for rows, shape in [(1, (37, 100)), (3, (37, 100)), (32, (70, 520)), (2, (160, 896))]
                for gated in (False, True)
            ),
        ]
    else:
        errors = [(str(check), check.run(ptx=False), check.bound) for check in CORNER[part]]
        if part == "single":
            errors.append(("many pairs", many_pairs_error(), ATTENTION_ERROR))
    for name, error, bound in errors:
        print(f"{error:.2e} (at most {bound:.0e}) {name}")
    bad = [name for name, error, bound in errors if not error <= bound]
    assert not bad, bad


if __name__ == "__main__":
    main()
