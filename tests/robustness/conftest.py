"""One cluster for all that is done to it: 2 prefill, 2 decode, 2 routers and etcd, fp32, one profile.

Each test leaves it as it found it. Few trials run with the whole suite; `make test-robustness` runs all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.otlp_collector import Collector
from support.process_fleet import ProcessFleet, process_fleet

FULL = os.environ.get("HMA_ROBUSTNESS") == "full"
FLAGS = {
    "decode": ("--dtype", "float32", "--threads", "1", "--registry-ttl", "4"),
    "prefill": ("--profile", "f32", "--threads", "1", "--chunk-tokens", "64", "--registry-ttl", "4"),
    "router": ("--local-prefill-tokens", "0"),
}


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the fleet's traces."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="session")
def fleet(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessFleet]:
    # The fleet outlives its tests by the rest of the suite, so its environment must be its own.
    tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    directory = tmp_path_factory.mktemp("fleet")
    with process_fleet(directory, prefill=2, decode=2, routers=2, flags=FLAGS, variables=tracing) as running:
        yield running


@pytest.fixture(scope="session")
def trials() -> int:
    """Kills of each kind."""
    return 20 if FULL else 3


@pytest.fixture(scope="session")
def restarts() -> int:
    """Rolling restarts."""
    return 10 if FULL else 3
