"""The registry's store on etcd v3.

Two rules keep a watch from losing events. A watch resumes after the last *event* it has seen; the revision in a
response's header is that of the whole store when the response was made, so it may run ahead of events that are still on
their way. Only a notification that the server sends to this watch by itself, when it has caught up, counts as progress.
The answers to our own progress requests prove nothing but life: servers before 3.4.25 and 3.5.8 send them ahead of
pending events.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from hma_serve.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from hma_serve.etcd.v3 import etcd_pb2
from hma_serve.registry import etcd_client as api
from hma_serve.registry.endpoints import Endpoint, Tls
from hma_serve.registry.records import PREFIX
from hma_serve.registry.store import Batch, Compacted, Entry, Event, Lease, LeaseLost, Listing

PAGE = 512
"""Keys per answer of a listing: with records of at most 64 KiB, below the receive limit."""

_PROGRESS_REPLY = -1
_PROGRESS_REQUEST = etcd_pb2.WatchRequest(progress_request=etcd_pb2.WatchProgressRequest())


class EtcdStore:
    """`Store` on an etcd cluster.

    Args:
        endpoints: The members.
        tls: For https endpoints.
        pulse: Seconds between requests for a sign of life on a watch.
        silence: Seconds without any message after which a watch counts as dead.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        endpoints: tuple[Endpoint, ...],
        tls: Tls | None = None,
        *,
        pulse: float = 1.5,
        silence: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = api.EtcdClient(endpoints, tls)
        self._pulse, self._silence, self._clock = pulse, silence, clock

    def check(self, timeout: float) -> None:
        """See `ReadableStore`."""
        self.get(PREFIX, timeout)

    def get(self, key: str, timeout: float) -> Entry | None:
        """See `ReadableStore`."""
        response = self.client.unary(api.RANGE, etcd_pb2.RangeRequest(key=key.encode()), timeout)
        return _entry(response.kvs[0]) if response.kvs else None

    def list(self, prefix: str, timeout: float) -> Listing:
        """See `ReadableStore`. Pages after the first are read at the first one's revision."""
        deadline = self._clock() + timeout
        request = etcd_pb2.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix.encode()), limit=PAGE)
        entries: list[Entry] = []
        while True:
            page = self.client.unary(api.RANGE, request, max(deadline - self._clock(), 0.001))
            entries += map(_entry, page.kvs)
            request.revision = request.revision or page.header.revision
            if not page.more:
                return Listing(request.revision, tuple(entries))
            request.key = page.kvs[-1].key + b"\0"

    def watch(self, prefix: str, start_revision: int) -> EtcdWatch:
        """See `ReadableStore`."""
        return EtcdWatch(self.client, prefix, start_revision, self._pulse, self._silence, self._clock)

    def grant(self, ttl: float, timeout: float) -> Lease:
        """See `Store`. etcd counts whole seconds and has a minimum. A grant whose answer is lost runs out by itself."""
        response = self.client.unary(api.LEASE_GRANT, etcd_pb2.LeaseGrantRequest(ttl=math.ceil(ttl)), timeout)
        if response.error or not response.id:
            raise Unavailable(f"etcd granted no lease: {response.error or 'no reason given'}")
        return Lease(response.id, float(response.ttl))

    def keep_alive(self, lease: int, timeout: float) -> float:
        """See `Store`. A call per renewal: nothing to resume, and the next one may go to another member."""
        response = self.client.unary(api.LEASE_KEEP_ALIVE, etcd_pb2.LeaseKeepAliveRequest(id=lease), timeout)
        if response.ttl <= 0:
            raise LeaseLost("etcd says that the lease has run out")
        return float(response.ttl)

    def revoke(self, lease: int, timeout: float) -> None:
        """See `Store`."""
        try:
            self.client.unary(api.LEASE_REVOKE, etcd_pb2.LeaseRevokeRequest(id=lease), timeout)
        except LeaseLost:
            return

    def create(self, key: str, value: bytes, lease: int, timeout: float) -> int:
        """See `Store`."""
        absent = etcd_pb2.Compare(target=etcd_pb2.COMPARE_TARGET_CREATE, key=key.encode(), create_revision=0)
        revision = self._put_if(absent, value, lease, timeout)
        if revision is None:
            raise AlreadyExists(f"{key} is registered already")
        return revision

    def replace(self, key: str, value: bytes, lease: int, mod_revision: int, timeout: float) -> int:
        """See `Store`."""
        unchanged = etcd_pb2.Compare(target=etcd_pb2.COMPARE_TARGET_MOD, key=key.encode(), mod_revision=mod_revision)
        revision = self._put_if(unchanged, value, lease, timeout)
        if revision is None:
            raise FailedPrecondition(f"{key} has changed since revision {mod_revision}")
        return revision

    def close(self) -> None:
        """See `ReadableStore`."""
        self.client.close()

    def _put_if(self, condition: etcd_pb2.Compare, value: bytes, lease: int, timeout: float) -> int | None:
        put = etcd_pb2.RequestOp(request_put=etcd_pb2.PutRequest(key=condition.key, value=value, lease=lease))
        request = etcd_pb2.TxnRequest(compare=[condition], success=[put])
        response = self.client.unary(api.TXN, request, timeout)
        return response.header.revision if response.succeeded else None


class EtcdWatch:
    """One watch call. gRPC's own request thread sends the pulse and, when nothing comes back, cancels the call."""

    def __init__(
        self,
        client: api.EtcdClient,
        prefix: str,
        start_revision: int,
        pulse: float,
        silence: float,
        clock: Callable[[], float],
    ) -> None:
        self._client, self._prefix, self._start = client, prefix.encode(), start_revision
        self._pulse, self._silence, self._clock = pulse, silence, clock
        self._closed = threading.Event()
        self._opened = threading.Event()
        self._silent = False
        self._heard = clock()
        self._member = -1
        self._call: Any = None
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Batch]:
        """See `WatchStream`."""
        call = self._open()
        if call is None:
            return
        try:
            for response in call:
                self._heard = self._clock()
                yield self._batch(response)
            if not self._closed.is_set():
                raise self._lost("it ended the watch")
        except grpc.RpcError as error:
            if self._silent:
                raise self._lost(f"it was silent for {self._silence:g} s") from error
            if not self._closed.is_set():
                raise self._client.translate(error, self._member) from error
        finally:
            self.close()

    def close(self) -> None:
        """See `WatchStream`."""
        with self._lock:
            self._closed.set()
            call = self._call
        if call is not None:
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                return None
            self._heard = self._clock()
            self._member, self._call = self._client.stream(api.WATCH, self._requests(), None)
            self._opened.set()
            return self._call

    def _requests(self) -> Iterator[etcd_pb2.WatchRequest]:
        yield etcd_pb2.WatchRequest(
            create_request=etcd_pb2.WatchCreateRequest(
                key=self._prefix,
                range_end=prefix_end(self._prefix),
                start_revision=self._start,
                progress_notify=True,
            )
        )
        while not self._closed.wait(self._pulse):
            if self._clock() - self._heard > self._silence:
                self._silent = True
                # Set by the thread that made the call, which may still be about to return to it.
                self._opened.wait()
                self._call.cancel()
                return
            yield _PROGRESS_REQUEST

    def _batch(self, response: etcd_pb2.WatchResponse) -> Batch:
        if response.compact_revision:
            raise Compacted(f"etcd is compacted up to revision {response.compact_revision}")
        if response.canceled:
            raise self._lost(response.cancel_reason or "it cancelled the watch")
        if response.events:
            return Batch(tuple(map(_event, response.events)), response.events[-1].kv.mod_revision + 1)
        if response.header.revision + 1 < self._start:
            # The store is younger than what we have seen (restored, or another one): nothing of ours would ever come.
            raise Compacted(f"etcd is at revision {response.header.revision}, before {self._start}")
        progress = not response.created and response.watch_id != _PROGRESS_REPLY
        return Batch(resume=response.header.revision + 1 if progress else None)

    def _lost(self, why: str) -> Unavailable:
        self._client.move_on(self._member)
        return Unavailable(f"lost the watch on etcd: {why}")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys that start with `prefix`; etcd's way to say a prefix."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"


def _entry(kv: etcd_pb2.KeyValue) -> Entry:
    return Entry(kv.key.decode(errors="replace"), kv.value, kv.mod_revision, kv.lease)


def _event(event: etcd_pb2.Event) -> Event:
    deleted = event.type == etcd_pb2.EVENT_TYPE_DELETE
    return Event(event.kv.key.decode(errors="replace"), None if deleted else _entry(event.kv))
