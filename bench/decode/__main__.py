"""`python -m bench.decode [--no-check] [PART ...]`: parts 8B, attention, 32B, 14B, 4B, codecs; all of them by default.

Runs the GPU tests in parallel processes (and compiles what is timed meanwhile), times, writes `decode.json` and
`decode.svg` into $OUT or the current directory, and prints its tables last. Part `attention` is (a) for block float,
`codecs` for other formats; format `bf16` in (b) is the same step with its KV materialised, so (c) is read off both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.decode import attention, step
from bench.decode.picture import picture
from bench.decode.timing import copy_bandwidth
from bench.figures import provenance

PARTS = ("8B", "attention", "32B", "14B", "4B", "codecs")


def main() -> int:
    """Runs what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="run the GPU tests first")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no new row after so many")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    out = Path(os.environ.get("OUT", "."))
    passed = _check(out) if args.check else None
    copy = copy_bandwidth()
    found: dict[str, Any] = {
        "provenance": provenance(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": copy / 1e12,
        "checks_passed": passed,
        "attention": [],
        "steps": [],
    }
    for part in args.parts or PARTS:
        kernel = part in attention.PARTS
        for row in attention.measure(copy, part) if kernel else step.measure(copy, part):
            found["attention" if kernel else "steps"].append(dataclasses.asdict(row))
            if time.monotonic() > end:
                break
        torch.cuda.empty_cache()
        (out / "decode.json").write_text(json.dumps(found, indent=1))
        if time.monotonic() > end:
            break
    (out / "decode.svg").write_text(picture(found))
    _show(found)
    return 1 if passed is False else 0


def _check(out: Path) -> bool:
    """Whether the GPU tests pass; compiles what will be timed beside them."""
    workers = max(1, (os.cpu_count() or 1) - 2)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", str(workers), "tests/gpu"]
    with (out / "checks.log").open("w") as log:
        running = [
            subprocess.Popen([sys.executable, "-c", f"from bench.decode import attention as a; a.fused_us{each}"])
            for each in attention.COMPILED
        ]
        passed = subprocess.run(tests, stdout=log, stderr=subprocess.STDOUT, check=False).returncode == 0
        compiled = [process.wait() == 0 for process in running]
        return passed and all(compiled)


def _show(found: dict[str, Any]) -> None:
    print(f"{found['gpu']}, torch {found['torch']}, copy {found['copy_tb_per_s']:.2f} TB/s, {found['provenance']}")
    print(f"checks passed: {found['checks_passed']}")
    print("(a) one layer: query heads, codec, sequences x tokens: us, TB/s, of copy | SDPA BF16, flex")
    for row in found["attention"]:
        even = "" if row["balanced"] else " imbalanced"
        beside = " ".join(f"{row[name]:.1f}" for name in ("sdpa_us", "flex_us") if row[name] is not None)
        print(
            f"{row['group']} {row['page_format']} {row['batch']}x{row['context']}{even}: {row['us']:.1f} "
            f"{row['tb_per_s']:.2f} {row['of_copy']:.2f} | {beside}"
        )
    print("(b) a step, ms: model, codec, sequences x tokens: step | products, attention, rest | floor, vLLM")
    for row in found["steps"]:
        rest = 1 - (row["gemm_ms"] + row["attention_ms"]) / row["ms"]
        print(
            f"{row['model']} {row['page_format']} {row['batch']}x{row['context']}: {row['ms']:.2f} | "
            f"{row['gemm_ms']:.2f} {row['attention_ms']:.2f} {rest:.0%} | {row['floor_ms']:.2f} {row['vllm_ms']} "
            f"| KV {row['kv_gb']:.1f} GB"
        )


if __name__ == "__main__":
    sys.exit(main())
