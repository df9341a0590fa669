"""Reading one value out of what a service tells Prometheus."""

from __future__ import annotations

import re


def metric_in(text: str, name: str) -> float:
    """The value of a metric; of a name without labels the sum over all of them, which is 0 before it counts."""
    bare = name.partition("{")[0]
    assert f"\n# TYPE {bare} " in f"\n{text}", f"{bare} is not among the metrics"
    labels = "" if "{" in name else r"(?:\{.*\})?"
    return sum(map(float, re.findall(rf"^{re.escape(name)}{labels} (\S+)$", text, re.MULTILINE)))
