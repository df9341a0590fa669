"""What the decode benchmark reads, chooses and shows; what it times needs a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.decode import checks, page, products, step
from bench.decode.beside import points, unless_refused
from bench.decode.pages import KINDS, page_bytes, random_pages
from bench.decode.picture import picture
from bench.whole_path import transfer_seconds
from hma_serve.decode.kernels.byte_pages import BYTE_PAGES
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, CODED_INTEGER, MXFP8
from hma_serve.decode.kernels.page_orders import fragment_page, packed_kind
from hma_serve.decode.page_order import Role

ROOT = Path(__file__).parents[2]
HEAD_DIM = 128
ROW: dict[str, Any] = {"model": "8B", "batch": 32, "context": 16384, "floor_ms": 13.2}


def case(name: str, inside: str = "", **properties: object) -> str:
    said = "".join(f'<property name="{key}" value="{value}" />' for key, value in properties.items())
    return f'<testcase classname="tests.gpu" name="{name}"><properties>{said}</properties>{inside}</testcase>'


def report(*cases: str) -> str:
    return f'<testsuites><testsuite name="pytest" time="12.5">{"".join(cases)}</testsuite></testsuites>'


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    path = tmp_path / "checks.xml"
    path.write_text(
        report(
            case("test_a[1]", codec="int8", error=1e-3, bound=3e-3),
            case("test_a[2]", codec="int8", error=2e-3, bound=3e-3),
            case("test_a[3]", codec="int8", error=1.5e-3, bound=3e-3),
            case("test_a[4]", codec="nvfp4", error="nan", bound=3e-3, inside='<failure message="no" />'),
            case("test_a[5]", codec="nvfp4", error=1e-3, bound=3e-3),
            case("test_b", error=0.0, bound=2e-2),
            case("test_c[fused]", mode="fused", parted=2, widest_gap=0.0625),
            case("test_c[materialise]", mode="materialise", parted=0, widest_gap=0.0),
            case("test_d", inside='<skipped message="one GPU" />'),
            case("test_e", inside='<error message="no" />'),
        )
    )
    return path


def test_counts_come_from_the_tests_report(xml: Path) -> None:
    found = checks.read(xml, passed=False)
    assert found.checks == checks.Checks(all_passed=False, passed=7, failed=2, skipped=1, seconds=12.5)


def test_all_pass_only_if_pytest_says_so(xml: Path) -> None:
    xml.write_text(report(case("test_a")))
    assert checks.read(xml, passed=True).checks.all_passed
    assert not checks.read(xml, passed=False).checks.all_passed
    assert not checks.read(xml.with_name("missing.xml"), passed=True).checks.all_passed


def test_the_largest_error_of_a_test_and_format_is_kept_with_its_bound(xml: Path) -> None:
    rows = {(row.test, row.codec): row for row in checks.read(xml, passed=False).errors}
    assert list(rows) == [("test_a", "int8"), ("test_a", "nvfp4"), ("test_b", "")]
    assert rows["test_a", "int8"] == checks.ErrorRow("test_a", "int8", "", 3, 2e-3, 3e-3)
    assert rows["test_b", ""] == checks.ErrorRow("test_b", "", "", 1, 0.0, 2e-2)
    # What is no number is never less than a number.
    assert str(rows["test_a", "nvfp4"].error) == "nan"


def test_every_test_of_a_gpu_is_run() -> None:
    others = set((ROOT / "tests").rglob("test_*.py")) - {Path(__file__)}
    marked = {file for file in others if "pytest.mark.gpu" in file.read_text()}
    run = {ROOT / path for path in checks.PATHS}
    assert all(run & {file, *file.parents} for file in marked), marked


def test_parted_texts_are_listed_by_mode(xml: Path) -> None:
    rows = checks.read(xml, passed=False).parted
    assert rows == [checks.PartedRow("fused", 2, 0.0625), checks.PartedRow("materialise", 0, 0.0)]


def test_every_format_is_read_as_one_that_is_timed() -> None:
    assert {packed_kind(name) for name in BYTE_PAGES} == {kind for kind in KINDS.values() if kind}
    for name, kind in KINDS.items():
        assert packed_kind(name) == kind
        assert page_bytes(kind, HEAD_DIM) == fragment_page(name, Role.K, HEAD_DIM).page_bytes


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind])
def test_random_pages_have_ordinary_scales(name: str) -> None:
    kind = KINDS[name]
    scales = random_pages(kind, HEAD_DIM, 64, "cpu")[:, 32 * HEAD_DIM :]
    if kind == CODED_INTEGER:
        codes, scales = scales[:, :-16], scales[:, -16:]
        assert codes.shape[1] == 2 * HEAD_DIM
        decoded = codes.contiguous().view(torch.float8_e4m3fn).float()
        assert 0.5 <= decoded.min() <= decoded.max() < 2
        page = scales.contiguous().view(torch.float32)
        assert torch.equal(page, page[:, :1].expand_as(page))
    if kind in (BLOCK_FLOAT, MXFP8):
        assert 118 <= scales.min() <= scales.max() < 130
    else:
        wide = scales.contiguous().view(torch.float32)
        assert 0 <= wide.min() <= wide.max() < 0.01


def test_the_largest_batch_has_the_longest_context_too() -> None:
    assert (16384, 128) in set(points())


def test_what_another_refuses_is_left_out() -> None:
    def refused() -> float:
        raise RuntimeError("indices of 32 bits")

    assert unless_refused(refused) is None
    assert unless_refused(lambda: 1.0) == 1.0


def test_each_mode_stands_beside_the_vllm_of_its_kv() -> None:
    assert step.vllm_ms("8B", "bf16", 32, 16384) == 21.6829
    assert step.vllm_ms("8B", "tt_bfp8_b", 32, 16384) == 16.9352
    assert step.vllm_ms("8B", "tt_bfp8_b", 1, 1024) == 5.2566
    assert step.vllm_ms("4B", "tt_bfp8_b", 1, 1024) == step.vllm_ms("4B", "bf16", 1, 1024) == 3.682
    assert step.vllm_ms("8B", "bf16", 2, 4096) is None
    for model, rows in step.ROWS.items():
        assert all(step.vllm_ms(model, name, *row) for row in rows for name in ("bf16", "tt_bfp8_b"))


def test_the_picture_shows_packed_steps_alone() -> None:
    packed = ROW | {"page_format": "tt_bfp8_b", "ms": 14.19, "vllm_ms": 16.94}
    plain = ROW | {"page_format": "bf16", "ms": 99.94, "vllm_ms": 21.68}
    assert picture({"gpu": "H200", "steps": [packed, plain]}) == picture({"gpu": "H200", "steps": [packed]})
    assert "14.19" in picture({"gpu": "H200", "steps": [packed, plain]})


def test_a_run_writes_and_prints_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], xml: Path
) -> None:
    main = importlib.import_module("bench.decode.__main__")
    steps = [
        step.StepRow("8B", name, 32, 1024, 5.5, 3.9, 0.8, 4.2, step.vllm_ms("8B", name, 32, 1024), 2.7)
        for name in ("tt_bfp8_b", "bf16")
    ]
    both = [
        products.ProductRow("8B", 32, 3.85, 4.03),
        products.ProductRow("8B", 64, None, 4.13),
        products.ProductStepRow("8B", "bf16", 32, 16384, 21.56, 21.79),
    ]
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["bench.decode", "8B", "products"])
    monkeypatch.setattr(main, "copy_bandwidth", lambda: 4.25e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(checks, "run", lambda out, expression: checks.read(xml, passed=False))
    monkeypatch.setattr(step, "measure", lambda copy, model: iter(steps))
    monkeypatch.setattr(products, "measure", lambda: iter(both))
    assert main.main() == 1
    found = json.loads((tmp_path / "decode.json").read_text())
    assert found["compiled"] is True
    assert found["checks"]["failed"] == 2
    assert [row["mode"] for row in found["parted"]] == ["fused", "materialise"]
    assert [(row["page_format"], row["vllm_ms"]) for row in found["steps"]] == [
        ("tt_bfp8_b", 6.4628),
        ("bf16", 6.6446),
    ]
    assert [row["own_ms"] for row in found["products"]] == [3.85, None]
    assert found["product_steps"][0]["library_ms"] == 21.79
    assert (tmp_path / "decode.svg").read_text().count("Qwen3-8B") == 1
    printed = capsys.readouterr().out
    for line in ("test_a int8, of 3: 0.002 | 0.003", "fused: 2, 0.0625", "8B, 64: - 4.13", "8B bf16 32x16384: 21.56"):
        assert line in printed


def test_the_page_shows_what_was_measured() -> None:
    assert page.with_tables(page.PAGE.read_text()) == page.PAGE.read_text(), "run python -m bench.decode.page"
    assert page.steps_picture() == page.PICTURE.read_text()


def test_all_figures_of_the_page_are_of_one_commit() -> None:
    commits = {page.results(part)["provenance"] for part in ("attention", "steps", "beside", "extend", "products")}
    assert len(commits) == 1


def test_a_layers_transfer_is_the_median_of_all_prompts(tmp_path: Path) -> None:
    """Two layers of three prompts, after one that is not measured; a layer cannot leave before the one in front."""
    times = [(0, 900), (900, 999), (1000, 1004), (1001, 1009), (2000, 2006), (2010, 2017), (3000, 3100), (3001, 3300)]
    events = tmp_path / "events.jsonl"
    events.write_text("".join(f'{{"computed_ns": {ready}, "left_ns": {left}}}\n' for ready, left in times))
    assert transfer_seconds(events, 2, 3) == pytest.approx(6.5e-9)
