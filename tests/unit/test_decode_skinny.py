"""How a product of few rows is shared among programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hma_serve.decode.kernels.skinny import _cut

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
