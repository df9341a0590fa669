"""Reading what a service counts, from its metrics or from what it tells Prometheus."""

from __future__ import annotations

import re

from prometheus_client import Counter


def metric_in(text: str, name: str) -> float:
    """The value of a metric; of a name without labels the sum over all of them, which is 0 before it counts."""
    bare = name.partition("{")[0]
    assert f"\n# TYPE {bare} " in f"\n{text}", f"{bare} is not among the metrics"
    labels = "" if "{" in name else r"(?:\{.*\})?"
    return sum(map(float, re.findall(rf"^{re.escape(name)}{labels} (\S+)$", text, re.MULTILINE)))


def counted(metric: Counter) -> dict[tuple[str, ...], float]:
    """A counter's values by their labels."""
    samples = [sample for family in metric.collect() for sample in family.samples]
    return {tuple(sample.labels.values()): sample.value for sample in samples if sample.name.endswith("_total")}
