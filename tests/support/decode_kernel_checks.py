"""Runs the decode step's kernels on random data and compares with float64, or with the model itself; a program.

Triton's interpreter must be chosen before the kernels are imported, and the same checks run on a GPU. There the whole
grid runs, with the kernels' PTX; here a corner of it, with their twins in plain Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.attention import Span, TorchPagedAttention
from hma_serve.decode.kernels.attention_call import AttentionShape, AttentionWork, LayerPages, StepRows, pages_of
from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.kernels.matvec import matvec
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT
from hma_serve.decode.kernels.page_orders import fragment_page
from hma_serve.decode.kernels.step_model import StepMemory, StepModel
from hma_serve.decode.page_order import PageOrders, Role, page_order
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation
from hma_serve.model import Transformer, tensor_shapes
from hma_serve.quant import codec
from support.paged_kv import paged_case

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

ATTENTION_ERROR = 3e-3
"""Relative L2 against float64 of the decoded cache: probabilities and outputs are BF16, all else is finer."""

STEP_ERROR = 2e-2 if ON_GPU else 5e-2
"""Relative L2 of logits between two ways to round; the interpreter cuts instead of rounding to BF16."""


MATRICES = [(37, 100), (6144, 4096), (4096, 12288), (151936, 2560), (5120, 5120)]
"""Outputs and inputs of single rows' products."""


@dataclass(frozen=True)
class AttentionCheck:
    """One point of the grid; sequences are (packed pages, plain tokens)."""

    sequences: list[tuple[int, int]]
    group: int = 4
    head_dim: int = 128
    kv_heads: int = 2
    programs: int = 2112
    k_format: str = "tt_bfp8_b"
    v_format: str = "tt_bfp8_b"
    offset: bool = False

    def run(self, *, ptx: bool) -> float:
        """The relative error; NaN if anything was not written."""
        shape = AttentionShape(len(self.sequences), self.kv_heads, self.group, self.head_dim, self.programs, 1)
        case = paged_case(
            shape,
            self.sequences,
            k_format=self.k_format,
            v_format=self.v_format,
            offset=self.offset,
            device=DEVICE,
        )
        kind = torch.bfloat16 if ON_GPU else torch.float32
        out = torch.full(case.expected.shape, torch.nan, dtype=kind, device=DEVICE)
        case.work.number()
        case.work.attend(case.query, case.pages, out, scale=case.scale, ptx=ptx)
        return case.error(out)


CORNER = [
    AttentionCheck([(2, 5), (0, 33)], group=4, head_dim=64, kv_heads=1, programs=3, offset=True),
    AttentionCheck([(2, 1)], group=5, head_dim=32, kv_heads=2, programs=7, k_format="int8", v_format="fp8_e4m3fn"),
    AttentionCheck([(1, 40)], group=8, head_dim=32, kv_heads=1, programs=1, k_format="mxfp8_e4m3", v_format="mxint8"),
]


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
    lengths = [AttentionCheck([(0, length)], kv_heads=8) for length in (1, 31, 32, 33, 1000, 4999)]
    codecs = [
        AttentionCheck(_IMBALANCED, k_format=k, v_format=v)
        for k, v in [*((name, name) for name in sorted(BYTE_PAGES)), ("tt_bfp8_b", "tt_bfp4_b"), ("int8", "fp8_e4m3fn")]
    ]
    return heads + batches + lengths + codecs


def _uneven(count: int, most: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(count)
    packed = torch.randint(0, most, (count,), generator=generator).tolist()
    plain = torch.randint(1, 70, (count,), generator=generator).tolist()
    return list(zip(packed, plain, strict=True))


def step_error(*, ptx: bool) -> float:
    """A step of a small model over a packed prompt, a prompt's end of several tokens, and a sequence of one token."""
    config = ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
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
    sequences = [(1, 3, 1), (0, 0, 4), (0, 0, 1)]  # packed groups, plain tokens there, tokens to compute
    tokens = torch.randint(0, 96, (6,), generator=generator)
    positions = torch.cat([torch.arange(32 * a + b, 32 * a + b + c) for a, b, c in sequences])
    reference = _pool(config, page_order, "cpu")
    spans = _filled(reference, sequences)
    hidden = Transformer(config, weights).forward(
        tokens, positions, TorchPagedAttention(reference, config.num_heads).plan(spans)
    )
    expected = Transformer(config, weights).logits(hidden).double()

    pool = _pool(config, fragment_page, DEVICE)
    model = StepModel(config, {name: value.to(DEVICE) for name, value in weights.items()}, ptx=ptx)
    found = _step(model, pool, _filled(pool, sequences), tokens)
    return float((found.cpu().double() - expected).norm() / expected.norm())


def matvec_error(outputs: int, width: int, *, ptx: bool) -> float:
    """Of one row's product against float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, width, generator=generator)
    matrix = torch.randn(outputs, width, generator=generator)
    if ON_GPU:
        x, matrix = x.bfloat16(), matrix.bfloat16()
    expected = x.double() @ matrix.double().T
    found = matvec(x.to(DEVICE), matrix.to(DEVICE), pdl=ptx).cpu().double()
    return float((found - expected).norm() / expected.norm())


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
    """What the runner does, without a graph; the last token is taken from the step before."""
    config = model.config
    rows = [
        (slot, span.pages.need.packed_groups, span.start + i + 1)
        for slot, span in enumerate(spans)
        for i in range(span.count)
    ]
    table = torch.zeros(2, len(spans), pages_of(256), dtype=torch.int32)
    for slot, span in enumerate(spans):
        for role, held in enumerate(_held(span.pages)):
            table[role, slot, : len(held)] = held
    slot, packed, length = torch.tensor(rows, dtype=torch.int32).T.contiguous().to(DEVICE)
    step_rows = StepRows(slot, packed, length, torch.zeros_like(slot))
    shape = AttentionShape(len(rows), config.num_kv_heads, config.group_size, config.head_dim, 5, 1)
    k_table, v_table = table.to(DEVICE)
    pages = [LayerPages(layer, k_table, v_table, BLOCK_FLOAT, BLOCK_FLOAT) for layer in pool.memory.view(torch.int32)]
    given = tokens.int().to(DEVICE)
    last = torch.tensor([7, int(tokens[-1])], device=DEVICE)
    given[-1] = -2
    memory = StepMemory(given, last, torch.arange(len(rows), device=DEVICE), step_rows)
    return model.run(memory, [pages], [AttentionWork(shape, step_rows, 0, DEVICE)])


def _held(pages: Reservation) -> Iterator[torch.Tensor]:
    yield torch.cat([pages.packed_k, pages.plain_k])
    yield torch.cat([pages.packed_v, pages.plain_v])


def main() -> None:
    """The corner, one step and one product, in the interpreter."""
    errors = [(str(check), check.run(ptx=False), ATTENTION_ERROR) for check in CORNER]
    errors.append(("step", step_error(ptx=False), STEP_ERROR))
    errors.append(("matvec", matvec_error(*MATRICES[0], ptx=False), ATTENTION_ERROR))
    for name, error, bound in errors:
        print(f"{error:.2e} (at most {bound:.0e}) {name}")
    bad = [name for name, error, bound in errors if not error <= bound]
    assert not bad, bad


if __name__ == "__main__":
    main()
