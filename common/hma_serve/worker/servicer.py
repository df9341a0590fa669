"""The Worker service of an instance: who it is, how busy it is, and the order to leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from hma_serve.v1 import worker_pb2, worker_pb2_grpc
from hma_serve.worker.drain import Drain
from hma_serve.worker.load import WatchedLoad

_SHORTEST_INTERVAL = 0.1
_LONGEST_INTERVAL = 30.0
_DEFAULT_INTERVAL = 1.0

# Changes that come closer together than this are reported as one.
_COALESCE_SECONDS = 0.02


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves `hma_serve.v1.Worker`.

    Args:
        drain: Carries out the order to leave, and knows the current record.
        load: The gauges.
        default_grace: Seconds for a drain that names none.
    """

    def __init__(self, drain: Drain, load: WatchedLoad, *, default_grace: float) -> None:
        self._drain = drain
        self._load = load
        self._default_grace = default_grace

    async def Describe(  # noqa: N802
        self,
        request: worker_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DescribeRequest, worker_pb2.DescribeResponse],
    ) -> worker_pb2.DescribeResponse:
        """See the schema."""
        return worker_pb2.DescribeResponse(worker=self._drain.info.to_proto())

    async def WatchLoad(  # noqa: N802
        self,
        request: worker_pb2.WatchLoadRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchLoadRequest, worker_pb2.WatchLoadResponse],
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        """See the schema; the stream ends when the worker has drained."""
        interval = request.interval.ToTimedelta().total_seconds() or _DEFAULT_INTERVAL
        interval = min(max(interval, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        while not self._drain.done:
            yield worker_pb2.WatchLoadResponse(load=self._load.snapshot())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._load.changed()
                    await asyncio.sleep(_COALESCE_SECONDS)

    async def Drain(  # noqa: N802
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        """See the schema."""
        grace = request.grace.ToTimedelta().total_seconds() if request.HasField("grace") else self._default_grace
        result = await self._drain.run(max(0.0, grace))
        return worker_pb2.DrainResponse(finished=result.finished, cancelled=result.cancelled)
