"""One contract for every store: memory, and real etcd servers of the versions that are at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from hma_serve.core.errors import AlreadyExists, FailedPrecondition
from hma_serve.core.worker import WorkerRole, WorkerState
from hma_serve.etcd.v3 import etcd_pb2
from hma_serve.registry import EtcdStore, MemoryStore, Session, SessionState, Watcher, record_key
from hma_serve.registry.endpoints import parse_endpoints
from hma_serve.registry.etcd_client import COMPACT
from hma_serve.registry.store import Batch, Compacted, Entry, Event, LeaseLost, Store
from support.etcd_server import EtcdServer, binary_name, etcd_binaries
from support.worker_records import a_worker, wait_fleet

T = 5.0
TTL = 2.0
"""etcd's minimum, so that both kinds of store grant the same."""


@dataclass(frozen=True)
class Backend:
    open: Callable[[], Store]
    compact: Callable[[Store], None]


def memory_backend() -> Backend:
    store = MemoryStore(pulse=0.1, min_ttl=TTL)

    def compact(_: Store) -> None:
        store.compact()

    return Backend(lambda: store, compact)


def etcd_backend(server: EtcdServer) -> Backend:
    def compact(store: Store) -> None:
        assert isinstance(store, EtcdStore)
        revision = store.list("/", T).revision
        store.client.unary(COMPACT, etcd_pb2.CompactionRequest(revision=revision, physical=True), T)

    return Backend(lambda: EtcdStore(parse_endpoints(server.url), pulse=0.1), compact)


@pytest.fixture(
    scope="module", params=[None, *etcd_binaries()], ids=lambda binary: binary_name(binary) if binary else "memory"
)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    if request.param is None:
        yield memory_backend()
        return
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data", binary=request.param) as server:
        yield etcd_backend(server)


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    store = backend.open()
    yield store
    if isinstance(store, EtcdStore):
        store.close()


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/test/{request.node.name}/"


def first_change(stream: Iterator[Batch]) -> Batch:
    return next(batch for batch in stream if batch.events)


def test_a_key_is_created_only_once(store: Store, prefix: str) -> None:
    lease = store.grant(TTL, T)
    assert store.get(prefix + "a", T) is None
    revision = store.create(prefix + "a", b"one", lease.id, T)
    assert store.get(prefix + "a", T) == Entry(prefix + "a", b"one", revision, lease.id)
    with pytest.raises(AlreadyExists):
        store.create(prefix + "a", b"two", lease.id, T)
    assert store.get(prefix + "a", T) == Entry(prefix + "a", b"one", revision, lease.id)


def test_a_key_is_replaced_only_as_it_was_read(store: Store, prefix: str) -> None:
    lease = store.grant(TTL, T)
    first = store.create(prefix + "a", b"one", lease.id, T)
    second = store.replace(prefix + "a", b"two", lease.id, first, T)
    assert second > first
    with pytest.raises(FailedPrecondition):
        store.replace(prefix + "a", b"three", lease.id, first, T)
    with pytest.raises(FailedPrecondition):
        store.replace(prefix + "absent", b"x", lease.id, first, T)
    assert store.get(prefix + "a", T) == Entry(prefix + "a", b"two", second, lease.id)


def test_a_lease_takes_its_keys_along(store: Store, prefix: str) -> None:
    lease, other = store.grant(TTL, T), store.grant(TTL, T)
    assert lease.id != other.id
    assert lease.ttl >= TTL
    assert store.keep_alive(lease.id, T) == lease.ttl
    store.create(prefix + "a", b"", lease.id, T)
    store.create(prefix + "b", b"", lease.id, T)
    store.create(prefix + "c", b"", other.id, T)
    store.revoke(lease.id, T)
    assert [entry.key for entry in store.list(prefix, T).entries] == [prefix + "c"]


def test_a_lease_that_is_gone_is_lost(store: Store, prefix: str) -> None:
    lease = store.grant(TTL, T)
    revision = store.create(prefix + "a", b"", store.grant(TTL, T).id, T)
    store.revoke(lease.id, T)
    store.revoke(lease.id, T)
    with pytest.raises(LeaseLost):
        store.keep_alive(lease.id, T)
    with pytest.raises(LeaseLost):
        store.create(prefix + "b", b"", lease.id, T)
    with pytest.raises(LeaseLost):
        store.replace(prefix + "a", b"", lease.id, revision, T)


def test_a_listing_is_of_one_prefix_in_order(store: Store, prefix: str) -> None:
    lease = store.grant(30, T)
    numbers = [f"{number:04}" for number in range(1100)]  # more than two of etcd's pages
    for number in reversed(numbers):
        revision = store.create(prefix + number, number.encode(), lease.id, T)
    store.create(prefix.removesuffix("/") + "0", b"next to it", lease.id, T)
    listing = store.list(prefix, T)
    assert [entry.key for entry in listing.entries] == [prefix + number for number in numbers]
    assert [entry.value for entry in listing.entries] == [number.encode() for number in numbers]
    assert listing.revision > revision
    store.revoke(lease.id, T)


def test_a_watch_delivers_what_followed_a_listing(store: Store, prefix: str) -> None:
    lease = store.grant(30, T)
    store.create(prefix + "before", b"", lease.id, T)
    start = store.list(prefix, T).revision + 1
    added = store.create(prefix + "a", b"one", lease.id, T)
    changed = store.replace(prefix + "a", b"two", lease.id, added, T)
    store.create(f"/elsewhere{prefix}", b"", lease.id, T)
    store.revoke(lease.id, T)
    events: list[Event] = []
    with store.watch(prefix, start) as stream:
        for batch in stream:
            events += batch.events
            if len(events) == 4:
                break
    assert events[:2] == [
        Event(prefix + "a", Entry(prefix + "a", b"one", added, lease.id)),
        Event(prefix + "a", Entry(prefix + "a", b"two", changed, lease.id)),
    ]
    assert {event.key for event in events[2:]} == {prefix + "a", prefix + "before"}
    assert [event.entry for event in events[2:]] == [None, None]


def test_a_watch_resumes_without_a_gap_and_without_an_echo(store: Store, prefix: str) -> None:
    lease = store.grant(30, T)
    resume = store.list(prefix, T).revision + 1
    seen = []
    for number in range(10):
        store.create(f"{prefix}{number}", b"", lease.id, T)
        with store.watch(prefix, resume) as stream:
            batch = first_change(iter(stream))
        seen += [event.key for event in batch.events]
        assert batch.resume is not None
        resume = batch.resume
    assert seen == [f"{prefix}{number}" for number in range(10)]
    store.revoke(lease.id, T)


def test_a_watch_of_something_compacted_says_so(store: Store, backend: Backend, prefix: str) -> None:
    lease = store.grant(TTL, T)
    start = store.create(prefix + "a", b"", lease.id, T)
    store.revoke(lease.id, T)
    backend.compact(store)
    with store.watch(prefix, start) as stream, pytest.raises(Compacted):
        for _ in stream:
            pass
    revision = store.list(prefix, T).revision
    with store.watch(prefix, revision + 1) as stream:
        assert not next(iter(stream)).events


def test_a_quiet_watch_shows_that_it_is_alive(store: Store, prefix: str) -> None:
    with store.watch(prefix, store.list(prefix, T).revision + 1) as stream:
        batches = iter(stream)
        assert [next(batches).events for _ in range(3)] == [(), (), ()]


def test_a_watch_is_closed_from_another_thread(store: Store, prefix: str) -> None:
    stream = store.watch(prefix, store.list(prefix, T).revision + 1)
    started, ended = threading.Event(), threading.Event()

    def follow() -> None:
        for _ in stream:
            started.set()
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert started.wait(T)
    stream.close()
    assert ended.wait(T)
    thread.join(T)
    stream.close()
    assert list(stream) == []


def test_a_fleet_is_followed_through_registration_drain_and_departure(store: Store) -> None:
    prefill, decode = a_worker(WorkerRole.PREFILL), a_worker(WorkerRole.DECODE)
    with Session(store, prefill), Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: prefill.instance in fleet.workers)
        with Session(store, decode) as session, Watcher(store, role=WorkerRole.PREFILL) as prefills:
            fleet = wait_fleet(watcher, lambda fleet: decode.instance in fleet.workers)
            assert fleet.workers[decode.instance] == replace(decode, epoch=1)
            session.update(replace(decode, state=WorkerState.DRAINING))
            wait_fleet(watcher, lambda fleet: fleet.workers[decode.instance].state is WorkerState.DRAINING)
            fleet = wait_fleet(prefills, lambda fleet: prefill.instance in fleet.workers)
            assert decode.instance not in fleet.workers
        wait_fleet(watcher, lambda fleet: decode.instance not in fleet.workers)
        assert prefill.instance in watcher.current.workers


def test_a_worker_that_died_leaves_with_its_lease(store: Store) -> None:
    info = a_worker()
    lease = store.grant(TTL, T)
    store.create(record_key(info), b"left behind", lease.id, T)
    with Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: fleet.bad_records == 1)
        wait_fleet(watcher, lambda fleet: fleet.listed and fleet.bad_records == 0)


def test_a_session_whose_lease_was_revoked_comes_back_under_a_raised_epoch(store: Store) -> None:
    info = a_worker()
    with Session(store, info, ttl=TTL) as session, Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        entry = store.get(record_key(info), T)
        assert entry is not None
        store.revoke(entry.lease, T)
        wait_fleet(watcher, lambda fleet: info.instance not in fleet.workers)
        fleet = wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        assert fleet.workers[info.instance] == replace(info, epoch=2)
        assert session.wait_published(T)
        assert session.status.epoch == 2


def test_two_processes_of_one_name_do_not_share_a_key(store: Store) -> None:
    info = a_worker()
    with Session(store, info) as first:
        assert first.wait_published(T)
        with Session(store, replace(info, address="10.0.0.9:1")) as second:
            assert not second.wait_published(0.3)
            assert second.status.state is SessionState.STARTING
        assert first.status.state is SessionState.REGISTERED
        entry = store.get(record_key(info), T)
        assert entry is not None
