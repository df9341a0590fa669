"""`python -m bench.decode [--no-check] [--tests EXPRESSION] [PART ...]`: all parts by default, in the order of `PARTS`.

Compiles what it times and runs the GPU tests, both in parallel processes, then times, writes `decode.json` and
`decode.svg` into $OUT or the current directory, and prints its tables last. `decode.json` is written again after every
row, so a run that is cut short keeps what it had; what the tests found stands in it, too.

Parts `8B` to `4B` are whole steps (b); format `bf16` there is the same step with its KV materialised, so (c) is read
off both. Part `attention` is (a) for block float, `codecs` for other formats, `beside` what flex_attention and
FlashInfer take at the same points. `extend` is several query tokens of a sequence, read together or each for itself,
`8B-extend` a step with that. `products` are the 8B's by the package's kernels and by the library, and steps with each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.decode import attention, beside, checks, extend, products, step
from bench.decode.picture import picture
from bench.decode.timing import copy_bandwidth
from bench.figures import provenance

PARTS = ("8B", "attention", "extend", "8B-extend", "products", "32B", "14B", "4B", "codecs", "beside")
TABLES: dict[type, str] = {
    attention.AttentionRow: "attention",
    step.StepRow: "steps",
    products.ProductRow: "products",
    products.ProductStepRow: "product_steps",
    extend.ExtendRow: "extend",
    step.ExtendStepRow: "extend_steps",
    beside.BesideRow: "beside",
}
"""In which table a row stands."""
COMPILED: dict[str, list[str]] = {**attention.COMPILED, "extend": extend.COMPILED, "beside": beside.COMPILED}
"""By part: calls that compile, each in a process of its own, what will be timed."""


def main() -> int:
    """Runs what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="run the GPU tests first")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only those, as pytest -k takes it")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no new row after so many")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    end = time.monotonic() + args.seconds
    out = Path(os.environ.get("OUT", "."))
    compiling = _compile(parts)
    checked = checks.run(out, args.tests) if args.check else None
    compiled = [process.wait() for process in compiling] == [0] * len(compiling)
    copy = copy_bandwidth()
    tables: dict[str, list[Any]] = {name: [] for name in TABLES.values()}
    found: dict[str, Any] = {
        "provenance": provenance(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": copy / 1e12,
        "compiled": compiled,
        **_checked(checked),
        **tables,
    }
    result = out / "decode.json"
    result.write_text(json.dumps(found, indent=1))
    for part in parts:
        for row in _measure(copy, part):
            tables[TABLES[type(row)]].append(dataclasses.asdict(row))
            result.write_text(json.dumps(found, indent=1))
            if time.monotonic() > end:
                break
        torch.cuda.empty_cache()
        if time.monotonic() > end:
            break
    (out / "decode.svg").write_text(picture(found))
    _show(found)
    return 0 if compiled and (checked is None or checked.checks.all_passed) else 1


def _checked(report: checks.Report | None) -> dict[str, Any]:
    if report is None:
        return {"checks": None, "errors": [], "parted": []}
    return dataclasses.asdict(report)


def _measure(copy: float, part: str) -> Iterator[Any]:
    """A part's rows as they are measured."""
    if part in attention.PARTS:
        return attention.measure(copy, part)
    if part == "extend":
        return extend.measure()
    if part == "beside":
        return beside.measure()
    if part == "8B-extend":
        return step.measure_extends()
    if part == "products":
        return products.measure()
    return step.measure(copy, part)


def _compile(parts: Iterable[str]) -> list[subprocess.Popen[bytes]]:
    calls = [call for part in parts for call in COMPILED.get(part, ())]
    program = "from bench.decode import attention, beside; {}"
    return [subprocess.Popen([sys.executable, "-c", program.format(call)]) for call in calls]


def _show(found: dict[str, Any]) -> None:
    print(f"{found['gpu']}, torch {found['torch']}, copy {found['copy_tb_per_s']:.2f} TB/s, {found['provenance']}")
    print(f"compiled: {found['compiled']}, checks: {found['checks']}")
    print("the largest errors: test, codec, mode, of so many cases: error | bound")
    for row in found["errors"]:
        name = " ".join(part for part in (row["test"], row["codec"], row["mode"]) if part)
        print(f"{name}, of {row['cases']}: {row['error']:.2g} | {row['bound']:.2g}")
    print("texts that part from the CPU's: mode: how many, the widest gap")
    for row in found["parted"]:
        print(f"{row['mode']}: {row['parted']}, {row['widest_gap']:.4f}")
    print("(a) one layer: query heads, codec, sequences x tokens: us, TB/s, of copy | SDPA BF16")
    for row in found["attention"]:
        even = "" if row["balanced"] else " imbalanced"
        print(
            f"{row['group']} {row['page_format']} {row['batch']}x{row['context']}{even}: {row['us']:.1f} "
            f"{row['tb_per_s']:.2f} {row['of_copy']:.2f} | {_time(row['sdpa_us'], 1)}"
        )
    print("one layer on BF16: query heads, sequences x tokens: flex, FlashInfer, us")
    for row in found["beside"]:
        times = f"{_time(row['flex_us'], 1)} {_time(row['flashinfer_us'], 1)}"
        print(f"{row['group']} {row['batch']}x{row['context']}: {times}")
    print(
        "an extend: query heads, codec, sequences x tokens, query tokens: read together: us, MB loaded | SDPA BF16, us"
    )
    for row in found["extend"]:
        print(
            f"{row['group']} {row['page_format']} {row['batch']}x{row['context']}, {row['tokens']}: {row['queries']}: "
            f"{row['us']:.1f} {row['read_bytes'] / 1e6:.1f} | {row['sdpa_us']:.1f}"
        )
    print("a step of the 8B with an extend, ms: sequences x tokens, query tokens: without | together, each for itself")
    for row in found["extend_steps"]:
        print(
            f"{row['batch']}x{row['context']}, {row['tokens']}: {row['without_ms']:.2f} | "
            f"{row['together_ms']:.2f} {row['each_ms']:.2f}"
        )
    print("all products of a step, ms: model, rows: the package's kernels, the library")
    for row in found["products"]:
        print(f"{row['model']}, {row['rows']}: {_time(row['own_ms'], 2)} {row['library_ms']:.2f}")
    print("a step with either, ms: model, codec, sequences x tokens: the package's kernels, the library")
    for row in found["product_steps"]:
        print(
            f"{row['model']} {row['page_format']} {row['batch']}x{row['context']}: "
            f"{row['own_ms']:.2f} {row['library_ms']:.2f}"
        )
    print("(b) a step, ms: model, codec, sequences x tokens: step | products, attention, rest | floor, vLLM")
    for row in found["steps"]:
        rest = 1 - (row["gemm_ms"] + row["attention_ms"]) / row["ms"]
        print(
            f"{row['model']} {row['page_format']} {row['batch']}x{row['context']}: {row['ms']:.2f} | "
            f"{row['gemm_ms']:.2f} {row['attention_ms']:.2f} {rest:.0%} | {row['floor_ms']:.2f} "
            f"{_time(row['vllm_ms'], 2)} | KV {row['kv_gb']:.1f} GB"
        )


def _time(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
