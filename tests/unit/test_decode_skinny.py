"""How a product of few rows is shared among programs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hma_serve.decode.kernels.skinny import _cut, skinny

sizes = st.integers(1, 60_000)


@given(sizes, sizes, st.integers(1, 200), st.integers(1, 8))
def test_slices_hold_every_column_once(outputs: int, width: int, processors: int, most: int) -> None:
    cut = _cut(outputs, width, processors, most)
    assert 1 <= cut.slices <= most
    assert (cut.slices - 1) * cut.width < width <= cut.slices * cut.width


@given(sizes, sizes, st.integers(1, 200), st.integers(1, 8))
def test_several_slices_are_one_wave(outputs: int, width: int, processors: int, most: int) -> None:
    cut = _cut(outputs, width, processors, most)
    if cut.slices > 1:
        assert -(-outputs // 64) * cut.slices <= {3: 3, 4: 2}[cut.stages] * processors


@pytest.mark.parametrize(
    ("outputs", "width", "slices"), [(6144, 4096, 4), (4096, 4096, 4), (24576, 4096, 1), (4096, 12288, 4)]
)
def test_products_of_8b_on_an_h200(outputs: int, width: int, slices: int) -> None:
    assert _cut(outputs, width, 132, 8).slices == slices


def test_more_rows_than_its_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="33 rows are more than 32"):
        skinny(torch.zeros(33, 8), torch.zeros(4, 8), ptx=False)
