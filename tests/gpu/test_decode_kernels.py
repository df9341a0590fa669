"""The decode step's kernels on a GPU, over the whole grid."""

import pytest
import torch

from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.page_order import Role
from support.decode_kernel_checks import (
    ATTENTION_ERROR,
    MATRICES,
    STEP_ERROR,
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


@pytest.mark.parametrize("check", grid(), ids=str)
def test_attention_agrees_with_float64(check: AttentionCheck) -> None:
    assert check.run(ptx=True) <= ATTENTION_ERROR


@pytest.mark.parametrize("check", extend_grid(), ids=str)
def test_an_extend_agrees_with_float64(check: AttentionCheck) -> None:
    assert check.run(ptx=True) <= ATTENTION_ERROR


def test_the_twin_in_plain_triton_agrees_too() -> None:
    check = AttentionCheck([(2, 5), (0, 33)], head_dim=32, kv_heads=1, programs=3)
    assert check.run(ptx=False) <= ATTENTION_ERROR


def test_a_step_agrees_with_the_model() -> None:
    assert step_error(ptx=True) <= STEP_ERROR


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 32])
def test_a_product_of_few_rows_agrees_with_float64(rows: int, shape: tuple[int, int]) -> None:
    assert product_error(rows, *shape, ptx=True) <= ATTENTION_ERROR


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("page_format", BYTE_PAGES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_units_are_placed_as_they_are_arranged(page_format: str, role: Role, head_dim: int) -> None:
    assert misplaced_bytes(page_format, role, head_dim) == 0
