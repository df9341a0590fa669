"""The decode step's kernels on a GPU, over the whole grid; each test records its error for `bench.decode`."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from bench.decode.attention import work_of
from bench.decode.pages import KINDS, random_kv
from bench.decode.step import RandomWeights, config_of
from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.kernels.step_model import StepMemory, StepModel
from hma_serve.decode.page_order import Role
from support import small_kernel_checks as small
from support.decode_kernel_checks import (
    ATTENTION_ERROR,
    MATRICES,
    STEP_ERROR,
    STEP_SHAPES,
    AttentionCheck,
    extend_grid,
    grid,
    misplaced_bytes,
    product_error,
    step_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]

Judge = Callable[..., None]


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """Records an error with its bound and what it is of, and holds it against the bound."""

    def judged(error: float, bound: float, **of: str) -> None:
        for name, value in {"error": error, "bound": bound, **of}.items():
            record_property(name, value)
        assert error <= bound

    return judged


def _codec(check: AttentionCheck) -> str:
    return check.k_format if check.k_format == check.v_format else f"{check.k_format}, {check.v_format}"


@pytest.mark.parametrize("check", grid(), ids=str)
def test_attention_agrees_with_float64(check: AttentionCheck, judge: Judge) -> None:
    judge(check.run(ptx=True), check.bound, codec=_codec(check), mode=check.mode)


@pytest.mark.parametrize("check", extend_grid(), ids=str)
def test_an_extend_agrees_with_float64(check: AttentionCheck, judge: Judge) -> None:
    judge(check.run(ptx=True), check.bound, codec=_codec(check), mode=check.mode)


def test_the_twin_in_plain_triton_agrees_too(judge: Judge) -> None:
    check = AttentionCheck([(2, 5), (0, 33)], head_dim=32, kv_heads=1, programs=3)
    judge(check.run(ptx=False), ATTENTION_ERROR, codec=_codec(check))


@pytest.mark.parametrize("shape", STEP_SHAPES)
@pytest.mark.parametrize("one_row", [False, True])
def test_a_step_agrees_with_the_model(shape: str, one_row: bool, judge: Judge) -> None:
    judge(step_error(shape, ptx=True, one_row=one_row), STEP_ERROR)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 32])
def test_a_product_of_few_rows_agrees_with_float64(rows: int, shape: tuple[int, int], judge: Judge) -> None:
    judge(product_error(rows, *shape, ptx=True), ATTENTION_ERROR)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 32])
def test_a_gated_product_of_few_rows_agrees_with_float64(rows: int, shape: tuple[int, int], judge: Judge) -> None:
    judge(product_error(rows, *shape, ptx=True, gated=True), small.BOUND)


@pytest.mark.parametrize("parts", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("width", small.WIDTHS)
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_a_norm_agrees_with_float64(rows: int, width: int, parts: int, judge: Judge) -> None:
    judge(small.norm_error(rows, width, parts, ptx=True), small.BOUND)


@pytest.mark.parametrize("width", small.INNER)
@pytest.mark.parametrize("rows", [1, 33, 128])
def test_a_gate_agrees_with_float64(rows: int, width: int, judge: Judge) -> None:
    judge(small.gate_error(rows, width, ptx=True), small.BOUND)


@pytest.mark.parametrize("case", small.PROJECTIONS, ids=str)
def test_a_projection_agrees_with_float64(case: small.Projection, judge: Judge) -> None:
    judge(case.run(ptx=True), small.BOUND)


@pytest.mark.parametrize("width", small.WIDTHS)
def test_embedding_is_exact(width: int) -> None:
    assert small.embed_error(128, width) == 0


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("page_format", BYTE_PAGES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_units_are_placed_as_they_are_arranged(page_format: str, role: Role, head_dim: int) -> None:
    assert misplaced_bytes(page_format, role, head_dim) == 0


@pytest.mark.parametrize("page_format", ["tt_bfp8_b", "bf16"])
@pytest.mark.parametrize("rows", [1, 8, 32, 100])
def test_a_replayed_step_gives_the_same_bits(rows: int, page_format: str) -> None:
    # Kernels begin while those before them run: what one reads too early shows sooner or later.
    config = dataclasses.replace(config_of("8B"), num_layers=3, vocab_size=8192)
    contexts = [32 * (1 + 37 * row % 50) for row in range(rows)]
    kv = random_kv(KINDS[page_format], contexts, config.num_layers, config.num_kv_heads, config.head_dim)
    step, lines, order = StepModel(config, RandomWeights(config)), kv.rows(), torch.arange(rows, device="cuda")
    # By turns two batches of tokens, so that what is left of the turn before is wrong.
    batches = [order.int(), order.int() + rows]
    memory = StepMemory(batches[0].clone(), order, order, lines)
    pages, works = [kv.pages(layer) for layer in range(config.num_layers)], [work_of(config.group_size, lines)]
    differing = 0
    with torch.inference_mode():
        step.run(memory, [pages], works)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step.run(memory, [pages], works)
        first: list[torch.Tensor] = []
        for turn in range(300):
            memory.token.copy_(batches[turn % 2])
            logits.fill_(torch.nan)
            graph.replay()
            if turn < 2:
                torch.cuda.synchronize()
                first.append(logits.clone())
            differing += int((logits != first[turn % 2]).any())
    assert not torch.equal(*first)
    assert not differing
