"""A measured figure, and how a table of them is printed: with commit, hardware and seed, or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 0


@dataclass(frozen=True)
class Figure:
    """One line of a result.

    Attributes:
        name: What was measured.
        value: Median over the repeats.
        unit: Of the value; `x` for a ratio.
        low: Smallest repeat.
        high: Largest repeat.
        goal: What it should be, in words; empty: no goal.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    goal: str = ""


def figure(name: str, samples: Sequence[float], unit: str, goal: str = "") -> Figure:
    """The median of samples with their range."""
    return Figure(name, statistics.median(samples), unit, min(samples), max(samples), goal)


def interleave(repeats: int, *runs: Callable[[], float]) -> list[list[float]]:
    """Runs all candidates in turn, `repeats` times after one warm-up, so that drift of the machine hits all alike."""
    samples: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for kept, run in zip(samples, runs, strict=True):
            value = run()
            if repeat:
                kept.append(value)
    return samples


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Pairwise quotients."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def provenance() -> str:
    """Commit, hardware and seed, for the head of every table."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"commit {_commit()}, {os.cpu_count()} x {cpu}, Python {platform.python_version()}, seed {SEED}"


def _commit() -> str:
    """Of the checkout; a copy without one, or a machine without git, is told by $COMMIT."""
    if told := os.environ.get("COMMIT"):
        return told
    describe = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return found.stdout.strip() or "unknown"
    return "unknown"


def show(title: str, figures: Sequence[Figure]) -> None:
    """Prints one benchmark's table."""
    print(f"\n{title}")
    for row in figures:
        spread = f"[{row.low:.3g} .. {row.high:.3g}]"
        goal = f"  goal: {row.goal}" if row.goal else ""
        print(f"  {row.name:58s} {row.value:9.3g} {row.unit:8s} {spread:24s}{goal}", flush=True)
