"""What is logged while weights load: nothing often, the rate at the end."""

from __future__ import annotations

import logging

import pytest

from hma_serve.core.memory_plan import readable_bytes
from hma_serve.model import LoadLog


def lines(caplog: pytest.LogCaptureFixture, calls: list[tuple[float, int]], total: int) -> list[str]:
    """The log of a load whose progress came at these moments; it began at 100 s."""
    moments = iter([100.0, *(moment for moment, _ in calls)])
    with caplog.at_level(logging.INFO):
        progress = LoadLog(logging.getLogger("test"), clock=lambda: next(moments))
        for _, done in calls:
            progress(done, total)
    return [record.getMessage() for record in caplog.records]


def test_a_short_load_says_only_how_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    calls = [(100.5, 4_000_000), (101.9, 10_000_000), (101.99, 14_680_064)]
    assert lines(caplog, calls, 14_680_064) == ["loaded 14.7 MB of weights in 2.0 s"]


def test_a_long_load_reports_at_most_every_two_seconds(caplog: pytest.LogCaptureFixture) -> None:
    gigabyte = 10**9
    calls = [(100.0 + tenth / 10, tenth * gigabyte // 50) for tenth in range(1, 51)]
    assert lines(caplog, calls, gigabyte) == [
        "loading weights 40 % of 1.0 GB",
        "loading weights 80 % of 1.0 GB",
        "loaded 1.0 GB of weights in 5.0 s",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1_000, "1.0 kB"), (1_234_567, "1.2 MB"), (64_000_000_000, "64.0 GB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text
