"""Metrics are named where they are made; who reads them by name must know the real names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from hma_serve.telemetry.metrics import KeptCounter, decode_metrics, prefill_metrics, router_metrics

ROOT = Path(__file__).resolve().parents[2]
READERS = [
    *(ROOT / "helm" / "hma-serve" / "templates").iterdir(),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
    ROOT / "tools" / "hma_serve" / "cli" / "top_view.py",
]
NAME = re.compile(r"(?:hma_(?:router|prefill|decode)_|vllm:)[a-z_]*[a-z]")


def series() -> set[str]:
    """The names of all that the services count; a histogram's is that of its parts too."""
    names: set[str] = set()
    for make in (router_metrics, prefill_metrics, decode_metrics):
        registry = CollectorRegistry(auto_describe=True)
        make(registry)
        for metric in registry.collect():
            ends = {"counter": ["_total"], "histogram": ["", "_sum", "_count", "_bucket"]}
            names |= {metric.name + end for end in ends.get(metric.type, [""])}
    return names


def named(path: Path) -> set[str]:
    return set(NAME.findall(path.read_text()))


@pytest.mark.parametrize("path", [path for path in READERS if named(path)], ids=lambda path: path.name)
def test_what_is_read_is_counted(path: Path) -> None:
    assert named(path) <= series()


def test_autoscalers_and_top_read_some() -> None:
    assert {"decode.yaml", "prefill.yaml", "router.yaml", "top_view.py", "operations.md"} <= {
        path.name for path in READERS if named(path)
    }


def test_a_kept_counter_says_what_its_keeper_says() -> None:
    registry = CollectorRegistry(auto_describe=True)
    counter = KeptCounter("hma_test_steps_total", "Steps.", registry)
    assert registry.get_sample_value("hma_test_steps_total") == 0
    counter.set_function(lambda: 7)
    assert registry.get_sample_value("hma_test_steps_total") == 7
