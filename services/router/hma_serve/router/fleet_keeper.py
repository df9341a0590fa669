"""Keeps the fleet view current: registry in, load reports in, placements in; an immutable `Fleet` out.

Each known worker has one load stream, which is also its health check: a worker is placeable while its stream delivers.
The first connection failure, seen here or by a request, puts the worker away at once (waiting for its lease to run out
would send requests to a dead process for seconds); the stream is then tried again with growing pauses, and its first
report brings the worker back. Before a stream is trusted, `Describe` must answer with the registered instance: a
restarted worker has the address of the one that died.

Everything is confined to one event loop. Who waits for room subscribes and is called after every change that may have
made some.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from hma_serve.core.errors import FailedPrecondition, HmaError, Unavailable
from hma_serve.core.worker import WorkerInfo, WorkerRole
from hma_serve.registry import FleetSnapshot
from hma_serve.router.fleet import Fleet, Load, Share, WorkerView
from hma_serve.router.placement import RECOVERY_SECONDS, Demand, Placement
from hma_serve.rpc import ChannelCache, from_rpc_error
from hma_serve.v1 import worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT = 2.0
_SILENCE_FACTOR = 10
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
# A timer may fire a clock tick early.
_TIMER_SLACK = 0.01


class SnapshotSource(Protocol):
    """The registry's watcher, as far as the keeper uses it."""

    def subscribe(
        self, callback: Callable[[FleetSnapshot], None], loop: asyncio.AbstractEventLoop | None = None
    ) -> Callable[[], None]:
        """Calls back on `loop` with the current snapshot and every later one; returns the unsubscribe function."""
        ...


class _Worker:
    """The keeper's mutable record of one worker."""

    def __init__(self, info: WorkerInfo, now: float) -> None:
        self.info = info
        self.load: Load | None = None
        self.load_at = now
        self.away_since: float | None = now
        self.ours = Share()
        self.unseen = Share()
        self.reports = 0
        self.refused = False
        self.placed = 0
        self.stream: asyncio.Task[None] | None = None
        self.probe = asyncio.Event()

    def view(self) -> WorkerView:
        return WorkerView(
            info=self.info,
            load=self.load,
            load_at=self.load_at,
            away_since=self.away_since,
            ours=self.ours,
            unseen=self.unseen,
            refused=self.refused,
            placed=self.placed,
        )


class _Part:
    """What one hold has on one worker."""

    def __init__(self, worker: _Worker, tokens: int, kv_tokens: int) -> None:
        self.worker = worker
        self.tokens = tokens
        self.kv_tokens = kv_tokens
        self.reports = worker.reports


class Hold:
    """A placement that counts against its workers until it is released; releasing twice is harmless."""

    def __init__(self, keeper: FleetKeeper, placement: Placement, demand: Demand) -> None:
        self.placement = placement
        self._keeper = keeper
        decode = placement.decode
        self._decode = keeper._take(decode.instance, demand.prompt_tokens, demand.kv_tokens(decode.limits))
        self._prefill = keeper._take(placement.prefill.instance, placement.packed_tokens) if placement.prefill else None

    def release_prefill(self) -> None:
        """The prefill worker has done its part."""
        part, self._prefill = self._prefill, None
        self._keeper._give_back(part)

    def release(self) -> None:
        """The request has left both workers."""
        self.release_prefill()
        part, self._decode = self._decode, None
        self._keeper._give_back(part)


class FleetKeeper:
    """The fleet of one model, kept up to date; `async with` starts and ends it.

    Args:
        snapshots: The registry's watcher.
        channels: Shared with dispatch, so that a worker has one connection.
        serves: Which registered workers belong to the served model.
        interval: Seconds between load reports.
    """

    def __init__(
        self,
        snapshots: SnapshotSource,
        channels: ChannelCache,
        serves: Callable[[WorkerInfo], bool],
        *,
        interval: float = 0.5,
    ) -> None:
        self._snapshots = snapshots
        self._channels = channels
        self._serves = serves
        self._interval = interval
        self._workers: dict[str, _Worker] = {}
        self._foreign: set[str] = set()
        self._listeners: set[Callable[[], None]] = set()
        self._fleet: Fleet | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FleetKeeper:
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = self._snapshots.subscribe(self._on_snapshot, self._loop)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._unsubscribe()
        for worker in self._workers.values():
            self._end(worker)
        self._workers.clear()
        await asyncio.gather(*self._ending, return_exceptions=True)

    @property
    def fleet(self) -> Fleet:
        """The workers as known now."""
        if self._fleet is None:
            ordered = [self._workers[instance] for instance in sorted(self._workers)]
            self._fleet = Fleet(
                prefills=tuple(worker.view() for worker in ordered if worker.info.role is WorkerRole.PREFILL),
                decodes=tuple(worker.view() for worker in ordered if worker.info.role is WorkerRole.DECODE),
            )
        return self._fleet

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` after every change that may let a waiting request be placed; returns the way out."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def hold(self, placement: Placement, demand: Demand) -> Hold:
        """Counts the request against its workers from now on."""
        return Hold(self, placement, demand)

    def report_failure(self, instance: str) -> None:
        """A request could not reach the worker: puts it away and checks it at once."""
        worker = self._workers.get(instance)
        if worker is not None:
            self._put_away(worker, "a request could not reach it")
            worker.probe.set()

    def report_refusal(self, instance: str) -> None:
        """The worker says that it is full: nothing more is placed there until its next report."""
        worker = self._workers.get(instance)
        if worker is not None:
            worker.refused = True
            self._fleet = None

    # Placements, by way of Hold.

    def _take(self, instance: str, tokens: int, kv_tokens: int = 0) -> _Part | None:
        worker = self._workers.get(instance)
        if worker is None:
            return None
        worker.ours = worker.ours.plus(tokens, kv_tokens)
        worker.unseen = worker.unseen.plus(tokens, kv_tokens)
        worker.placed += 1
        self._fleet = None
        return _Part(worker, tokens, kv_tokens)

    def _give_back(self, part: _Part | None) -> None:
        if part is not None:
            worker = part.worker
            worker.ours = worker.ours.minus(part.tokens, part.kv_tokens)
            if part.reports == worker.reports:
                # It came and went between two reports.
                worker.unseen = worker.unseen.minus(part.tokens, part.kv_tokens)
            self._changed()

    # The registry.

    def _on_snapshot(self, snapshot: FleetSnapshot) -> None:
        for instance in self._workers.keys() - snapshot.workers.keys():
            _log.info("worker left the registry", extra={"instance": instance})
            self._end(self._workers.pop(instance))
        for info in snapshot.workers.values():
            if self._serves(info):
                self._learn(info)
            elif info.instance not in self._foreign:
                _log.warning(
                    "worker serves another model and is left alone",
                    extra={"instance": info.instance, "model": info.model.id, "fingerprint": info.model.fingerprint},
                )
        self._foreign = {info.instance for info in snapshot.workers.values() if not self._serves(info)}
        self._changed()

    def _learn(self, info: WorkerInfo) -> None:
        worker = self._workers.get(info.instance)
        if worker is not None and worker.info.address != info.address:
            self._end(worker)
            worker = None
        if worker is None:
            _log.info("worker joined", extra={"instance": info.instance, "address": info.address})
            worker = self._workers[info.instance] = _Worker(info, self._loop.time())
            worker.stream = self._loop.create_task(self._follow(worker), name=f"load of {info.instance}")
            self._loop.call_later(RECOVERY_SECONDS + _TIMER_SLACK, self._changed)
        worker.info = info

    def _end(self, worker: _Worker) -> None:
        if worker.stream is not None:
            worker.stream.cancel()
            self._ending.add(worker.stream)
            worker.stream.add_done_callback(self._ending.discard)

    # Load streams.

    async def _follow(self, worker: _Worker) -> None:
        """Streams the worker's load for as long as it is registered."""
        pause = _FIRST_PAUSE
        while True:
            worker.probe.clear()
            try:
                await self._stream(worker)
                reason = "its load stream ended"
            except HmaError as exc:
                reason = exc.message
            except TimeoutError:
                reason = "it does not report its load"
            if worker.away_since is None:
                pause = _FIRST_PAUSE
            self._put_away(worker, reason)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _stream(self, worker: _Worker) -> None:
        """One load stream, from the check of who answers to its end or the first sign of trouble."""
        with self._channels.lease(worker.info.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            request = worker_pb2.WatchLoadRequest()
            request.interval.FromNanoseconds(int(self._interval * 1e9))
            call = None
            try:
                described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=_DESCRIBE_TIMEOUT)
                if described.worker.instance != worker.info.instance:
                    raise FailedPrecondition(f"another instance answers at {worker.info.address}")
                call = stub.WatchLoad(request)
                while True:
                    response = await self._next_report(worker, call)
                    self._on_load(worker, Load.from_proto(response.load))
            except grpc.RpcError as exc:
                raise from_rpc_error(exc) from exc
            finally:
                if call is not None:
                    call.cancel()

    async def _next_report(
        self, worker: _Worker, call: grpc.aio.UnaryStreamCall[worker_pb2.WatchLoadRequest, worker_pb2.WatchLoadResponse]
    ) -> worker_pb2.WatchLoadResponse:
        read = asyncio.ensure_future(call.read())
        probe = asyncio.ensure_future(worker.probe.wait())
        try:
            timeout = max(_DESCRIBE_TIMEOUT, _SILENCE_FACTOR * self._interval)
            await asyncio.wait((read, probe), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                raise Unavailable("it is checked again") if probe.done() else TimeoutError
            response = read.result()
        finally:
            probe.cancel()
            read.cancel()
        if not isinstance(response, worker_pb2.WatchLoadResponse):
            raise Unavailable("its load stream ended")
        return response

    def _on_load(self, worker: _Worker, load: Load) -> None:
        if worker.away_since is not None:
            _log.info("worker is reachable", extra={"instance": worker.info.instance})
        worker.load = load
        worker.load_at = self._loop.time()
        worker.away_since = None
        worker.unseen = Share()
        worker.reports += 1
        worker.refused = False
        self._changed()

    def _put_away(self, worker: _Worker, reason: str) -> None:
        if worker.away_since is not None:
            return
        worker.away_since = self._loop.time()
        _log.warning("worker put away: %s", reason, extra={"instance": worker.info.instance})
        self._changed()
        # Requests that wait for it give up on it when it has had its time to come back.
        self._loop.call_later(RECOVERY_SECONDS + _TIMER_SLACK, self._changed)

    def _changed(self) -> None:
        self._fleet = None
        for listener in tuple(self._listeners):
            listener()
