"""Leaving, as every worker does it; whole workers leave in the services' own tests."""

import asyncio
from dataclasses import replace

import pytest

from hma_serve.core.errors import HmaError, Unavailable
from hma_serve.core.worker import WorkerRole, WorkerState
from hma_serve.v1 import worker_pb2
from hma_serve.worker import Drain, DrainResult, WatchedLoad
from support.worker_records import a_worker


class CountedLoad(WatchedLoad):
    def __init__(self, requests: int) -> None:
        super().__init__()
        self.count = requests

    @property
    def requests(self) -> int:
        return self.count

    def snapshot(self) -> worker_pb2.WorkerLoad:
        return worker_pb2.WorkerLoad(state=self.state, running=self.count)

    def end(self, requests: int) -> None:
        self.count -= requests
        self.notify()


class Leaving:
    """A worker with so many requests that is about to drain."""

    def __init__(self, requests: int) -> None:
        self.load = CountedLoad(requests)
        self.failures: list[HmaError] = []
        self.served = True
        self.drain = Drain(
            WorkerRole.DECODE, self.load, fail_requests=self._fail, set_not_serving=self._set_not_serving
        )

    def _fail(self, error: HmaError) -> int:
        self.failures.append(error)
        failed = self.load.count
        self.load.end(failed)
        return failed

    async def _set_not_serving(self) -> None:
        self.served = False


async def test_running_requests_are_waited_for() -> None:
    worker = Leaving(requests=2)
    leaving = asyncio.create_task(worker.drain.run(60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert worker.load.snapshot().state == worker_pb2.WORKER_STATE_DRAINING
    assert not worker.served
    worker.load.end(1)
    await asyncio.sleep(0)
    assert not leaving.done()
    worker.load.end(1)
    assert await leaving == DrainResult(finished=2, cancelled=0)
    assert worker.drain.done
    assert not worker.failures


async def test_what_is_left_after_the_grace_is_failed() -> None:
    worker = Leaving(requests=3)
    assert await worker.drain.run(0) == DrainResult(finished=0, cancelled=3)
    (error,) = worker.failures
    assert isinstance(error, Unavailable)
    assert "decode worker was told to leave" in error.message


async def test_a_second_order_waits_for_the_first() -> None:
    worker = Leaving(requests=1)
    assert await worker.drain.run(0) is await worker.drain.run(60)
    assert len(worker.failures) == 1


async def test_the_record_says_that_it_leaves() -> None:
    worker = Leaving(requests=0)
    known = a_worker()
    worker.drain.registered(known, None)
    assert worker.drain.info == known
    await worker.drain.run(0)
    assert worker.drain.info == replace(known, state=WorkerState.DRAINING)


async def test_a_worker_without_a_record_says_that_it_starts() -> None:
    with pytest.raises(Unavailable, match="decode worker is starting"):
        _ = Leaving(requests=0).drain.info
