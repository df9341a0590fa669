"""All tests that need a GPU, run before anything is timed, and what they recorded of errors.

pytest's own report (`checks.xml`) and output (`checks.log`) stay beside the result.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

PATHS = ("tests/gpu", "tests/unit/test_quant_codecs.py", "tests/unit/test_prefill_kernels.py")
"""All that hold a test marked `gpu`: to collect the whole of `tests` takes packages that a GPU machine lacks."""

_BAD = ("failure", "error")


@dataclass(frozen=True)
class Checks:
    """How the tests went.

    Attributes:
        all_passed: None failed, and pytest says so, too.
        passed: Tests.
        failed: Tests, errors of their fixtures and of collection included.
        skipped: Tests, most for want of a second GPU.
        seconds: All of them took.
    """

    all_passed: bool
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ErrorRow:
    """The largest error of a test's cases of a format and mode.

    Attributes:
        test: The function.
        codec: Of the pages; empty: the test has none.
        mode: Of KV or of the kernel; empty: the test has none.
        cases: That recorded an error.
        error: The largest.
        bound: What that one was held against.
    """

    test: str
    codec: str
    mode: str
    cases: int
    error: float
    bound: float


@dataclass(frozen=True)
class PartedRow:
    """Texts of the engine on the GPU that are not those of the CPU to their end.

    Attributes:
        mode: Of KV.
        parted: How many.
        widest_gap: How far from a tie the widest of them was where it parted, in logprob.
    """

    mode: str
    parted: int
    widest_gap: float


@dataclass(frozen=True)
class Report:
    """What pytest reported.

    Attributes:
        checks: Counts.
        errors: In the order of the tests.
        parted: The same.
    """

    checks: Checks
    errors: list[ErrorRow] = field(default_factory=list)
    parted: list[PartedRow] = field(default_factory=list)


def run(out: Path, expression: str) -> Report:
    """The GPU tests that the expression selects, as pytest -k takes it, in parallel processes."""
    workers = max(1, (os.cpu_count() or 1) - 2)
    xml = out / "checks.xml"
    xml.unlink(missing_ok=True)
    # Warnings are errors here: pytest-benchmark, where it happens to be installed, warns of parallel tests, and
    # reports of the newer family of properties, which they do not hold.
    tests = [sys.executable, "-m", "pytest", "-q", "--tb", "short", "-p", "no:benchmark", "-m", "gpu", "-k", expression]
    tests += ["-n", str(workers), "--junitxml", str(xml), "-o", "junit_family=xunit1", *PATHS]
    with (out / "checks.log").open("w") as log:
        code = subprocess.run(tests, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    return read(xml, passed=code == 0)


def read(xml: Path, *, passed: bool) -> Report:
    """What is in pytest's report, whose process passed or not; without one nothing ran."""
    if not xml.exists():
        return Report(Checks(all_passed=False))
    suites = list(ElementTree.parse(xml).getroot().iter("testsuite"))
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failed = sum(any(case.find(tag) is not None for tag in _BAD) for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    checks = Checks(
        all_passed=passed and not failed,
        passed=len(cases) - failed - skipped,
        failed=failed,
        skipped=skipped,
        seconds=sum(float(suite.get("time", 0)) for suite in suites),
    )
    return Report(checks, _largest(cases), list(_parted(cases)))


def _largest(cases: list[ElementTree.Element]) -> list[ErrorRow]:
    found: dict[tuple[str, str, str], ErrorRow] = {}
    for case in cases:
        said = _properties(case)
        if "error" not in said:
            continue
        key = case.get("name", "").partition("[")[0], said.get("codec", ""), said.get("mode", "")
        row = ErrorRow(*key, 1, float(said["error"]), float(said["bound"]))
        if before := found.get(key):
            # An error that is no number is as large as any.
            larger = before if row.error <= before.error or math.isnan(before.error) else row
            row = ErrorRow(*key, before.cases + 1, larger.error, larger.bound)
        found[key] = row
    return list(found.values())


def _parted(cases: list[ElementTree.Element]) -> Iterator[PartedRow]:
    for case in cases:
        said = _properties(case)
        if "parted" in said:
            yield PartedRow(said.get("mode", ""), int(said["parted"]), float(said["widest_gap"]))


def _properties(case: ElementTree.Element) -> dict[str, str]:
    return {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
