"""A decode worker and its client, for the files that test one: each has a worker of its own.

A file's `WORKER_ARGUMENTS` are further flags of its worker. Files about other workers have fixtures of these names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.decode_worker import Client, Worker, connected, make_checkpoint, running_worker


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def worker(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Worker]:
    with running_worker(checkpoint, *getattr(request.module, "WORKER_ARGUMENTS", ())) as made:
        yield made


@pytest.fixture
async def client(worker: Worker, checkpoint: Path) -> AsyncIterator[Client]:
    """Every test leaves the worker idle."""
    async with connected(worker, checkpoint) as made:
        yield made
        await made.idle()
