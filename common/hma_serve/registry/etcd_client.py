"""A thin etcd v3 client: named methods over synchronous gRPC channels, failover between members, typed errors.

Synchronous on purpose: it runs in threads that own no event loop, because leases must be renewed while a process's loop
is busy and because two loops in one process disturb each other in grpc.aio. One attempt per call; a failed attempt
moves the client on to the next member, so that whoever tries again (that is `Session` and `Watcher`) tries there.
`docs/adr/0002-own-etcd-client.md` says why this exists.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from hma_serve.core.errors import (
    FailedPrecondition,
    HmaError,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from hma_serve.etcd.v3 import etcd_pb2
from hma_serve.registry.endpoints import Endpoint, Tls
from hma_serve.registry.store import Compacted, LeaseLost

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """A gRPC method by its full path, and the type of its answers."""

    path: str
    response: type[Res]
    request: type[Req]


RANGE = Method("/etcdserverpb.KV/Range", etcd_pb2.RangeResponse, etcd_pb2.RangeRequest)
TXN = Method("/etcdserverpb.KV/Txn", etcd_pb2.TxnResponse, etcd_pb2.TxnRequest)
COMPACT = Method("/etcdserverpb.KV/Compact", etcd_pb2.CompactionResponse, etcd_pb2.CompactionRequest)
WATCH = Method("/etcdserverpb.Watch/Watch", etcd_pb2.WatchResponse, etcd_pb2.WatchRequest)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", etcd_pb2.LeaseGrantResponse, etcd_pb2.LeaseGrantRequest)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", etcd_pb2.LeaseRevokeResponse, etcd_pb2.LeaseRevokeRequest)
LEASE_KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", etcd_pb2.LeaseKeepAliveResponse, etcd_pb2.LeaseKeepAliveRequest
)

REQUIRE_LEADER = (("hasleader", "true"),)
"""A member cut off from the majority fails the call instead of answering from what it last knew."""

CHANNEL_OPTIONS = (
    # Ranges are paged and records capped; only a watch that catches up on a long history comes near.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    # A member that was down is tried again at the pace of our own back-off, not gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd allows a ping every 5 s. Finds a silent peer under a long watch; calls have deadlines of their own.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Otherwise two clients of one process would share a connection and its faults.
    ("grpc.use_local_subchannel_pool", 1),
    # etcd is infrastructure next door; a proxy for the web must not come in between.
    ("grpc.enable_http_proxy", 0),
)

_MEMBER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_ERRORS: dict[grpc.StatusCode, type[HmaError]] = {
    grpc.StatusCode.NOT_FOUND: LeaseLost,
    grpc.StatusCode.OUT_OF_RANGE: Compacted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
}


@dataclass(slots=True, eq=False)
class _Link:
    """A channel to one member, the certificates' stamp when it was opened, and how many calls run on it."""

    channel: grpc.Channel
    stamp: tuple[int, ...]
    calls: int = 0


class EtcdClient:
    """Channels to the members of one etcd cluster, opened when first needed. Safe to use from several threads.

    When the certificates are replaced, new calls get new channels, and an old one is closed after its last call.

    Args:
        endpoints: The members; tried in turn, starting with the first.
        tls: Used for those endpoints that are https.
    """

    def __init__(self, endpoints: tuple[Endpoint, ...], tls: Tls | None = None) -> None:
        self._endpoints = endpoints
        self._tls = tls or Tls()
        if any(endpoint.secure for endpoint in endpoints):
            self._tls.credentials()  # says at once what is wrong with the files
        self._lock = threading.Lock()
        self._links: dict[int, _Link] = {}
        self._outdated: list[_Link] = []
        self._current = 0
        self._closed = False

    @property
    def endpoint(self) -> Endpoint:
        """The member that the next call goes to."""
        return self._endpoints[self._current]

    def unary(self, method: Method[Req, Res], request: Req, timeout: float) -> Res:
        """One request, one answer, within `timeout` seconds; needs no thread but the caller's.

        A streaming method that is asked once answers once, which on the wire is the same.

        Raises:
            Unavailable: No answer; what was asked for may have happened.
            HmaError: etcd refused; see `_ERRORS`.
        """
        index, link = self._take()
        stub = link.channel.unary_unary(
            method.path, request_serializer=_serialize, response_deserializer=method.response.FromString
        )
        try:
            response: Res | None = stub(request, timeout=timeout, metadata=REQUIRE_LEADER)
        except grpc.RpcError as error:
            raise self.translate(error, index) from error
        except ValueError as error:
            raise _closed() from error
        finally:
            self._give_back(link)
        if response is None:
            raise self._unreachable(index, "it ended the call without an answer")
        return response

    def stream(self, method: Method[Req, Res], requests: Iterator[Req], timeout: float | None) -> tuple[int, Any]:
        """Opens a stream; returns the member's index, for `translate`, and gRPC's call. The caller cancels the call.

        Raises:
            Unavailable: The client is closed, or this process gets no thread for the call.
        """
        index, link = self._take()
        stub = link.channel.stream_stream(
            method.path, request_serializer=_serialize, response_deserializer=method.response.FromString
        )
        try:
            call = stub(requests, timeout=timeout, metadata=REQUIRE_LEADER)
        except ValueError as error:
            self._give_back(link)
            raise _closed() from error
        except RuntimeError as error:
            # gRPC goes on as if the thread that it could not start were there: later calls on the channel would never
            # end, and nor would closing it.
            self._abandon(index, link)
            raise Unavailable(f"cannot call etcd at {self._endpoints[index]}: {error}") from error
        if not call.add_callback(lambda: self._give_back(link)):
            self._give_back(link)
        return index, call

    def translate(self, error: grpc.RpcError, index: int) -> HmaError:
        """The typed error of a failed call; moves on to the next member if this one is at fault."""
        code, details = error.code(), error.details() or ""
        if code in _MEMBER_FAULTS or code not in _ERRORS:
            return self._unreachable(index, f"{code.name.lower()}: {details}")
        return _ERRORS[code](f"etcd refused: {details}")

    def move_on(self, index: int) -> None:
        """The next call goes to another member, unless one has moved on from `index` already."""
        with self._lock:
            if self._current == index:
                self._current = (index + 1) % len(self._endpoints)

    def close(self) -> None:
        """Closes the channels. Calls must have ended: closing under a running one leaks its socket."""
        with self._lock:
            self._closed = True
            links = [*self._links.values(), *self._outdated]
            self._links.clear()
            self._outdated.clear()
        for link in links:
            link.channel.close()

    def _unreachable(self, index: int, why: str) -> Unavailable:
        self.move_on(index)
        return Unavailable(f"cannot reach etcd at {self._endpoints[index]}; check --etcd ({why})")

    def _take(self) -> tuple[int, _Link]:
        """The channel for one call to the current member, and its index; pair with `_give_back`."""
        with self._lock:
            if self._closed:
                raise _closed()
            idle = [link for link in self._outdated if not link.calls]
            self._outdated = [link for link in self._outdated if link.calls]
            index = self._current
            link = self._links[index] = self._renewed(self._endpoints[index], self._links.get(index))
            link.calls += 1
        for old in idle:
            old.channel.close()
        return index, link

    def _give_back(self, link: _Link) -> None:
        with self._lock:
            link.calls -= 1

    def _abandon(self, index: int, link: _Link) -> None:
        """The next call opens another channel; this one outlives the process, as its end would wait for ever."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(link.channel))
        with self._lock:
            if self._links.get(index) is link:
                del self._links[index]

    def _renewed(self, endpoint: Endpoint, link: _Link | None) -> _Link:
        """The member's channel; a new one if there is none or the certificates were replaced since."""
        if not endpoint.secure:
            return link or _Link(grpc.insecure_channel(endpoint.target, CHANNEL_OPTIONS), ())
        stamp = self._tls.stamp()
        if link is not None and stamp in ((), link.stamp):
            return link
        try:
            credentials = self._tls.credentials()
        except InvalidArgument:
            if link is None:
                raise
            return link  # a file is missing in the middle of a replacement
        if link is not None:
            self._outdated.append(link)
        return _Link(grpc.secure_channel(endpoint.target, credentials, CHANNEL_OPTIONS), stamp)


def _closed() -> Unavailable:
    return Unavailable("the etcd client is closed")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
