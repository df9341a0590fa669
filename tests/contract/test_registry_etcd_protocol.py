"""What the etcd store says on the wire, and what it makes of answers that real servers give only on a bad day."""

from __future__ import annotations

import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hma_serve.core.errors import HmaError, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable
from hma_serve.etcd.v3 import etcd_pb2 as pb
from hma_serve.registry import EtcdStore, Tls, Watcher, encode_record, record_key
from hma_serve.registry.endpoints import Endpoint, parse_endpoints
from hma_serve.registry.etcd_store import prefix_end
from hma_serve.registry.store import Compacted, LeaseLost
from support.worker_records import a_worker, wait_fleet

T = 5.0

METHODS: dict[str, tuple[Any, bool]] = {
    "/etcdserverpb.KV/Range": (pb.RangeRequest, False),
    "/etcdserverpb.KV/Txn": (pb.TxnRequest, False),
    "/etcdserverpb.Lease/LeaseGrant": (pb.LeaseGrantRequest, False),
    "/etcdserverpb.Lease/LeaseKeepAlive": (pb.LeaseKeepAliveRequest, True),
    "/etcdserverpb.Watch/Watch": (pb.WatchRequest, True),
}


class FakeEtcd(grpc.GenericRpcHandler):
    """Answers unary calls with `unary(path, request)` and streams with `stream(path, requests, context)`."""

    def __init__(self) -> None:
        self.unary: Callable[[str, Any], Any] = lambda path, request: pb.RangeResponse()
        self.stream: Callable[[str, Iterator[Any], grpc.ServicerContext], Iterator[Any]] = no_answers
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.metadata: list[dict[str, str | bytes]] = []
        self._executor = ThreadPoolExecutor(8)
        self.server = grpc.server(self._executor, handlers=[self])

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        request, streaming = METHODS[details.method]
        kind = grpc.stream_stream_rpc_method_handler if streaming else grpc.unary_unary_rpc_method_handler

        def handle(incoming: Any, context: grpc.ServicerContext) -> Any:
            self.metadata.append(dict(context.invocation_metadata()))
            if self.status is not None:
                context.abort(*self.status)
            answer = self.stream(details.method, incoming, context) if streaming else None
            return answer if answer is not None else self.unary(details.method, incoming)

        return kind(handle, request.FromString, lambda message: message.SerializeToString())

    def close(self) -> None:
        self.server.stop(None).wait()
        self._executor.shutdown()


def no_answers(path: str, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
    yield from ()


@pytest.fixture
def fake() -> Iterator[FakeEtcd]:
    fake = FakeEtcd()
    yield fake
    fake.close()


@pytest.fixture
def store(fake: FakeEtcd) -> Iterator[EtcdStore]:
    port = fake.server.add_insecure_port("127.0.0.1:0")
    fake.server.start()
    store = EtcdStore(parse_endpoints(f"127.0.0.1:{port}"), pulse=0.05, silence=0.5)
    yield store
    store.close()


class Script:
    """A watch whose answers the test gives one by one; None ends the call. Requests can be looked at."""

    def __init__(self) -> None:
        self.answers: queue.Queue[pb.WatchResponse | None] = queue.Queue()
        self.requests: queue.Queue[pb.WatchRequest] = queue.Queue()

    def __call__(
        self, path: str, requests: Iterator[pb.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.WatchResponse]:
        self.requests.put(next(requests))
        context.add_callback(lambda: self.answers.put(None))
        while (answer := self.answers.get()) is not None:
            yield answer


def header(revision: int) -> pb.ResponseHeader:
    return pb.ResponseHeader(revision=revision)


def put_event(revision: int) -> pb.Event:
    return pb.Event(kv=pb.KeyValue(key=b"/p/a", value=b"v", mod_revision=revision))


def test_a_watch_asks_from_its_revision_and_wants_a_leader(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.stream = script = Script()
    script.answers.put(pb.WatchResponse(header=header(41), created=True))
    with store.watch("/p/", 42) as stream:
        next(iter(stream))
    request = script.requests.get(timeout=T).create_request
    assert (request.key, request.range_end, request.start_revision) == (b"/p/", b"/p0", 42)
    assert request.progress_notify
    assert fake.metadata[0]["hasleader"] == "true"


def test_the_point_to_resume_from_is_the_event_and_never_the_header_beside_it(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.stream = script = Script()
    script.answers.put(pb.WatchResponse(header=header(100), created=True))
    script.answers.put(pb.WatchResponse(header=header(200), events=[put_event(50), put_event(51)]))
    # The answer to a request of ours may overtake events; only what the server sends by itself is progress.
    script.answers.put(pb.WatchResponse(header=header(300), watch_id=-1))
    script.answers.put(pb.WatchResponse(header=header(400)))
    with store.watch("/p/", 42) as stream:
        batches = iter(stream)
        assert [next(batches).resume for _ in range(4)] == [None, 52, None, 401]


def test_a_deletion_has_no_entry(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.stream = script = Script()
    gone = pb.Event(type=pb.EVENT_TYPE_DELETE, kv=pb.KeyValue(key=b"/p/a", mod_revision=9))
    script.answers.put(pb.WatchResponse(header=header(9), events=[gone]))
    with store.watch("/p/", 9) as stream:
        (event,) = next(iter(stream)).events
    assert (event.key, event.entry) == ("/p/a", None)


def test_a_silent_watch_is_given_up(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.stream = script = Script()
    script.answers.put(pb.WatchResponse(header=header(41), created=True))
    with store.watch("/p/", 42) as stream, pytest.raises(Unavailable, match="silent"):
        for _ in stream:
            pass


def test_a_watch_keeps_asking_for_a_sign_of_life(fake: FakeEtcd, store: EtcdStore) -> None:
    def echo(path: str, requests: Iterator[pb.WatchRequest], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            asked = request.WhichOneof("request_union") == "progress_request"
            yield pb.WatchResponse(header=header(41), watch_id=-1 if asked else 0, created=not asked)

    fake.stream = echo
    with store.watch("/p/", 42) as stream:
        batches = iter(stream)
        # Longer than the silence that is tolerated.
        assert all(next(batches).resume is None for _ in range(15))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (pb.WatchResponse(header=header(60), canceled=True, compact_revision=50), Compacted),
        (pb.WatchResponse(header=header(60), canceled=True, cancel_reason="no leader"), Unavailable),
        (pb.WatchResponse(header=header(40), created=True), Compacted),
        (None, Unavailable),
    ],
    ids=["compacted", "cancelled", "younger", "ended"],
)
def test_a_watch_that_cannot_go_on_says_why(
    fake: FakeEtcd, store: EtcdStore, answer: pb.WatchResponse | None, error: type[HmaError]
) -> None:
    fake.stream = script = Script()
    script.answers.put(answer)
    with store.watch("/p/", 42) as stream, pytest.raises(error):
        for _ in stream:
            pass


def test_a_fleet_survives_headers_that_run_ahead(fake: FakeEtcd, store: EtcdStore) -> None:
    """The watch breaks between an event and the next one; a client that trusts headers would never see the second."""
    first, second = a_worker(instance="first"), a_worker(instance="second")
    history = {
        50: pb.Event(kv=pb.KeyValue(key=record_key(first).encode(), value=encode_record(first), mod_revision=50)),
        60: pb.Event(kv=pb.KeyValue(key=record_key(second).encode(), value=encode_record(second), mod_revision=60)),
    }

    def one_event_then_break(path: str, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        start = next(requests).create_request.start_revision
        yield pb.WatchResponse(header=header(99), created=True)
        yield pb.WatchResponse(header=header(99), watch_id=-1)
        for revision in sorted(history):
            if revision >= start:
                yield pb.WatchResponse(header=header(99), events=[history[revision]])
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        for _ in requests:
            yield pb.WatchResponse(header=header(99), watch_id=-1)

    fake.unary = lambda path, request: pb.RangeResponse(header=header(40))
    fake.stream = one_event_then_break
    with Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: fleet.workers.keys() == {"first", "second"})


def test_a_listing_pins_the_first_pages_revision(fake: FakeEtcd, store: EtcdStore) -> None:
    asked: list[pb.RangeRequest] = []

    def pages(path: str, request: pb.RangeRequest) -> pb.RangeResponse:
        asked.append(request)
        number = len(asked)
        kv = pb.KeyValue(key=f"/p/{number}".encode(), mod_revision=number)
        return pb.RangeResponse(header=header(100 * number), kvs=[kv], more=number < 3)

    fake.unary = pages
    listing = store.list("/p/", T)
    assert listing.revision == 100
    assert [entry.key for entry in listing.entries] == ["/p/1", "/p/2", "/p/3"]
    assert [request.revision for request in asked] == [0, 100, 100]
    assert [request.key for request in asked] == [b"/p/", b"/p/1\0", b"/p/2\0"]
    assert {request.range_end for request in asked} == {b"/p0"}


def test_whole_seconds_are_asked_for_and_the_servers_answer_counts(fake: FakeEtcd, store: EtcdStore) -> None:
    def grant(path: str, request: pb.LeaseGrantRequest) -> pb.LeaseGrantResponse:
        assert request.ttl == 3
        return pb.LeaseGrantResponse(id=7, ttl=60)

    fake.unary = grant
    lease = store.grant(2.1, T)
    assert (lease.id, lease.ttl) == (7, 60.0)


def test_a_grant_without_a_lease_is_none(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.unary = lambda path, request: pb.LeaseGrantResponse(error="no space")
    with pytest.raises(Unavailable, match="no space"):
        store.grant(2, T)


def test_a_renewal_that_grants_nothing_is_a_loss(fake: FakeEtcd, store: EtcdStore) -> None:
    fake.stream = lambda path, requests, context: iter([pb.LeaseKeepAliveResponse(id=7, ttl=0)])
    with pytest.raises(LeaseLost):
        store.keep_alive(7, T)


def test_a_renewal_that_is_not_answered_proves_nothing(fake: FakeEtcd, store: EtcdStore) -> None:
    with pytest.raises(Unavailable, match="without an answer"):
        store.keep_alive(7, T)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.UNKNOWN, Unavailable),
        (grpc.StatusCode.NOT_FOUND, LeaseLost),
        (grpc.StatusCode.OUT_OF_RANGE, Compacted),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
    ],
)
def test_refusals_are_typed(fake: FakeEtcd, store: EtcdStore, code: grpc.StatusCode, error: type[HmaError]) -> None:
    fake.status = (code, "because")
    with pytest.raises(error, match="because"):
        store.get("/p/a", T)
    with pytest.raises(error, match="because"):
        store.keep_alive(7, T)


def test_failed_calls_go_round_the_members(fake: FakeEtcd, store: EtcdStore) -> None:
    alive = store.client.endpoint
    dead = Endpoint("127.0.0.1:1", secure=False)
    several = EtcdStore((dead, dead, alive))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            several.check(T)
    several.check(T)
    several.check(T)
    assert several.client.endpoint == alive
    several.close()


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"/p/", b"/p0"), (b"a\xff", b"b"), (b"a\xff\xff", b"b"), (b"\xff", b"\0")]
)
def test_the_end_of_a_prefix(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("making certificates needs openssl")
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-subj", "/CN=test root", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        (directory / "san").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl("req", *key[:-2], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return directory


def test_tls_shows_the_clients_certificate_and_checks_the_servers(fake: FakeEtcd, certificates: Path) -> None:
    ca, certificate, key = (certificates / name for name in ("ca.pem", "client.pem", "client.key"))
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], ca.read_bytes(), require_client_auth=True)
    port = fake.server.add_secure_port("127.0.0.1:0", credentials)
    fake.server.start()
    endpoints = parse_endpoints(f"https://127.0.0.1:{port}")
    for tls, accepted in (
        (Tls(ca, certificate, key), True),
        (Tls(ca), False),  # no client certificate
        (Tls(None, certificate, key), False),  # a root that the system does not trust
    ):
        store = EtcdStore(endpoints, tls)
        if accepted:
            store.check(T)
        else:
            with pytest.raises(Unavailable):
                store.check(T)
        store.close()


def test_where_no_thread_can_start_leases_are_renewed_and_a_later_watch_works(
    fake: FakeEtcd, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renewed(path: str, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            yield pb.LeaseKeepAliveResponse(id=request.id, ttl=7)

    start, caller = threading.Thread.start, threading.current_thread()

    def no_thread(thread: threading.Thread) -> None:
        if threading.current_thread() is caller:
            raise RuntimeError("can't start new thread")
        start(thread)  # the server's

    fake.stream = renewed
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        assert store.keep_alive(5, T) == 7
        with store.watch("/p/", 42) as stream, pytest.raises(Unavailable, match="can't start new thread"):
            next(iter(stream))
    # On the channel where a thread failed to start, such a call would wait for ever.
    assert store.keep_alive(5, T) == 7
    fake.stream = script = Script()
    script.answers.put(pb.WatchResponse(header=header(41), created=True))
    with store.watch("/p/", 42) as stream:
        next(iter(stream))
