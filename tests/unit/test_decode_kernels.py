"""The decode step's kernels in Triton's interpreter, and the order of their pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hma_serve.decode.kernels.attention_call import AttentionShape, queries_at_once, together, warps_at_once
from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.kernels.page_orders import fragment_page, packed_kind
from hma_serve.decode.page_order import Role
from hma_serve.quant import codec

TESTS = Path(__file__).parents[1]
ROLES = pytest.mark.parametrize("role", Role)


@pytest.mark.parametrize(
    "program",
    [
        *(["decode_kernel_checks", part] for part in ("single", "extend", "materialise", "step", "placing")),
        ["small_kernel_checks"],
    ],
    ids=" ".join,
)
def test_kernels_agree_with_float64_and_with_the_model(program: list[str]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    module, *part = program
    command = [sys.executable, "-m", f"support.{module}", *part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_kernels_compile_for_a_gpu_that_is_not_here(vendor: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "support.decode_kernel_compilation", vendor]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@ROLES
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("page_format", [*BYTE_PAGES, "bf16"])
def test_a_page_gives_back_what_came(page_format: str, head_dim: int, role: Role) -> None:
    units = codec(page_format).encode(torch.randn(3, 2, 64, head_dim))
    order = fragment_page(page_format, role, head_dim)
    pages = order.arrange(units)
    assert pages.shape == (3, 2, 2, order.page_bytes)
    if page_format in ("mxfp4", "nvfp4"):  # A zero's sign is not kept.
        assert torch.equal(codec(page_format).decode(order.restore(pages)), codec(page_format).decode(units))
    else:
        assert torch.equal(order.restore(pages), units)


@ROLES
def test_every_element_of_a_byte_page_has_its_place(role: Role) -> None:
    units = torch.arange(32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8)
    page = fragment_page("int8", role, 32).arrange(torch.cat([units, units.new_zeros(128)])[None])[0]
    lane, half, group = 13, 1, 1  # g = 3, t = 1
    row, column = 3 + 8, 2 * 1 + 1 + 8  # the last of the lane's eight elements
    token, channel = (row, column) if role is Role.K else (column, row)
    expected = int(units[(16 * half + token) * 32 + 16 * group + channel])
    found = int(page[((half * 1 + 0) * 32 + lane) * 16 + 8 * group + 7])
    assert found == (expected ^ 128 if role is Role.K else expected)


def test_formats_without_a_reader_have_no_kind() -> None:
    assert [name for name in ("int4", "bf16", "f32") if packed_kind(name) is not None] == []


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("count", range(1, 34))
def test_query_tokens_are_read_together_in_order(count: int, queries: int) -> None:
    more = together(count, queries)
    assert len(more) == count
    row = 0
    while row < count:
        size = more[row] + 1
        assert 0 < size <= queries
        assert more[row + 1 : row + size] == [-i for i in range(1, size)]
        row += size
    assert sum(each >= 0 for each in more) == -(-count // queries)


@pytest.mark.parametrize("group", range(1, 9))
def test_as_many_query_tokens_are_read_together_as_fill_two_products(group: int) -> None:
    queries = queries_at_once(group)
    assert queries * group <= 16 < (queries + 1) * group
    assert AttentionShape(3, 2, group, 64, 7, queries=queries).tiles == 2
    assert warps_at_once(group, 1) > warps_at_once(group, queries) >= 8


@pytest.mark.parametrize(
    ("group", "head_dim", "queries"), [(9, 64, 1), (0, 64, 1), (4, 96, 1), (4, 256, 1), (4, 64, 7), (4, 64, 0)]
)
def test_what_the_kernel_cannot_read_is_refused(group: int, head_dim: int, queries: int) -> None:
    with pytest.raises(ValueError, match=r"query (heads|tokens)"):
        AttentionShape(1, 1, group, head_dim, 1, queries=queries)
