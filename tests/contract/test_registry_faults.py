"""Accidents with real etcd servers: killed, stopped, cut off, compacted meanwhile; and a process that is busy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hma_serve.core.errors import Unavailable
from hma_serve.core.worker import WorkerState
from hma_serve.etcd.v3 import etcd_pb2
from hma_serve.registry import EtcdStore, FleetSnapshot, Session, SessionState, Watcher, open_store, record_key
from hma_serve.registry.endpoints import parse_endpoints
from hma_serve.registry.etcd_client import COMPACT
from support.etcd_server import EtcdServer, binary_name, etcd_binaries
from support.tcp_proxy import TcpProxy
from support.worker_records import a_worker, wait_fleet

T = 5.0
TTL = 2.0

one_server = pytest.mark.parametrize("etcd", etcd_binaries()[:1], ids=binary_name, indirect=True)
"""For what depends on our side alone."""


@pytest.fixture(params=etcd_binaries(), ids=binary_name)
def etcd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "data", binary=request.param) as server:
        yield server


@pytest.fixture
def store(etcd: EtcdServer) -> Iterator[EtcdStore]:
    store = EtcdStore(parse_endpoints(etcd.url), pulse=0.2, silence=1.0)
    yield store
    store.close()


def fresh(fleet: FleetSnapshot) -> bool:
    return fleet.stale_since is None


def test_a_killed_etcd_comes_back_to_the_fleet_it_had(etcd: EtcdServer, store: EtcdStore) -> None:
    info, later = a_worker(), a_worker()
    with Session(store, info, ttl=10) as session, Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        etcd.kill()
        stale = wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
        assert info.instance in stale.workers
        # Wanted while nobody can be told.
        session.update(replace(info, state=WorkerState.DRAINING))
        assert not session.wait_published(0.3)
        assert session.status.routable
        etcd.restart()
        fleet = wait_fleet(
            watcher,
            lambda fleet: (
                fresh(fleet)
                and info.instance in fleet.workers
                and fleet.workers[info.instance].state is WorkerState.DRAINING
            ),
        )
        # The lease had time left: the same registration goes on.
        assert fleet.workers[info.instance].epoch == 1
        with Session(store, later, ttl=10):
            wait_fleet(watcher, lambda fleet: {info.instance, later.instance} <= fleet.workers.keys())
    assert session.status.state is SessionState.CLOSED


def test_an_outage_longer_than_the_lease_ends_with_everybody_registered(etcd: EtcdServer, store: EtcdStore) -> None:
    info = a_worker()
    lost = threading.Event()
    with (
        Session(
            store, info, ttl=TTL, on_status=lambda s: lost.set() if s.state is SessionState.LOST else None
        ) as session,
        Watcher(store) as watcher,
    ):
        wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        etcd.kill()
        assert lost.wait(3 * TTL)
        assert info.instance in watcher.current.workers
        etcd.restart()
        fleet = wait_fleet(watcher, lambda fleet: fresh(fleet) and info.instance in fleet.workers)
        assert session.wait_published(T)
        assert fleet.workers[info.instance].address == info.address


def test_a_stopped_etcd_is_noticed_and_outlived(etcd: EtcdServer, store: EtcdStore) -> None:
    info = a_worker()
    with Session(store, info, ttl=TTL) as session, Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        etcd.pause()
        # Connections stay open and nothing is refused: only the silence tells.
        stale = wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
        assert info.instance in stale.workers
        etcd.resume()
        wait_fleet(watcher, lambda fleet: fresh(fleet) and info.instance in fleet.workers)
        assert session.wait_published(T)


def test_keys_that_vanish_in_a_gap_that_is_compacted_away_are_missed_by_nobody(
    etcd: EtcdServer, store: EtcdStore
) -> None:
    host, port = etcd.url.removeprefix("http://").split(":")
    goes, stays, comes = a_worker(), a_worker(), a_worker()
    with TcpProxy((host, int(port))) as link, Session(store, stays):
        far = EtcdStore(parse_endpoints(f"127.0.0.1:{link.port}"), pulse=0.2, silence=1.0)
        with Watcher(far) as watcher:
            with Session(store, goes):
                wait_fleet(watcher, lambda fleet: {goes.instance, stays.instance} <= fleet.workers.keys())
                link.cut()
                wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
            with Session(store, comes) as session:
                assert session.wait_published(T)
                revision = store.list("/", T).revision
                store.client.unary(COMPACT, etcd_pb2.CompactionRequest(revision=revision, physical=True), T)
                assert goes.instance in watcher.current.workers
                link.heal()
                fleet = wait_fleet(watcher, fresh)
                fleet = wait_fleet(watcher, lambda fleet: comes.instance in fleet.workers)
                assert fleet.workers.keys() == {stays.instance, comes.instance}
        far.close()


@one_server
def test_a_black_hole_is_noticed(etcd: EtcdServer, store: EtcdStore) -> None:
    host, port = etcd.url.removeprefix("http://").split(":")
    with TcpProxy((host, int(port))) as link:
        far = EtcdStore(parse_endpoints(f"127.0.0.1:{link.port}"), pulse=0.2, silence=1.0)
        with Watcher(far) as watcher:
            wait_fleet(watcher, fresh)
            link.freeze()
            wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
            with pytest.raises(Unavailable):
                far.check(0.2)
            link.heal()
            wait_fleet(watcher, fresh)
        far.close()


@one_server
def test_another_member_takes_over(etcd: EtcdServer, store: EtcdStore) -> None:
    host, port = etcd.url.removeprefix("http://").split(":")
    info = a_worker()
    with TcpProxy((host, int(port))) as link:
        near = EtcdStore(parse_endpoints(f"127.0.0.1:{link.port},{etcd.url}"), pulse=0.2, silence=1.0)
        with Session(near, info, ttl=10) as session, Watcher(near) as watcher:
            wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
            assert str(link.port) in near.client.endpoint.target
            link.cut()
            wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
            wait_fleet(watcher, fresh)
            session.update(replace(info, profile="bf16"))
            wait_fleet(watcher, lambda fleet: fleet.workers[info.instance].profile == "bf16")
            assert session.status.epoch == 1
        near.close()


@one_server
def test_a_store_that_starts_over_is_listed_again(etcd: EtcdServer, tmp_path: Path) -> None:
    """A restored backup or a fresh cluster has a lower revision than we have seen: waiting for it to pass is wrong."""
    host, port = etcd.url.removeprefix("http://").split(":")
    old = a_worker()
    with EtcdServer(tmp_path / "another") as young, TcpProxy((host, int(port))) as link:
        far = EtcdStore(parse_endpoints(f"127.0.0.1:{link.port}"), pulse=0.2, silence=1.0)
        direct = open_store(etcd.url)
        with Watcher(far) as watcher:
            with Session(direct, old) as session:
                for number in range(5):
                    session.update(replace(old, profile=f"p{number}"))
                    assert session.wait_published(T)
                wait_fleet(watcher, lambda fleet: old.instance in fleet.workers)
                link.cut()
                wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
            link.redirect((host, int(young.url.rsplit(":", 1)[1])))
            link.heal()
            fleet = wait_fleet(watcher, lambda fleet: fresh(fleet) and old.instance not in fleet.workers)
            assert fleet.revision < 5
        far.close()
        direct.close()


@one_server
async def test_a_blocked_event_loop_does_not_cost_the_registration(etcd: EtcdServer, store: EtcdStore) -> None:
    info = a_worker()
    async with Session(store, info, ttl=3) as session:
        assert await session.published(T)
        before = store.get(record_key(info), T)
        assert before is not None
        time.sleep(4.5)  # noqa: ASYNC251  (that is the point)
        assert store.get(record_key(info), T) == before
        with store.watch(record_key(info), before.mod_revision + 1) as stream:
            assert not next(iter(stream)).events
        assert session.status.state is SessionState.REGISTERED


@one_server
def test_nothing_is_left_behind(etcd: EtcdServer) -> None:
    def once() -> None:
        store = EtcdStore(parse_endpoints(etcd.url), pulse=0.05)
        with Session(store, a_worker()) as session, Watcher(store) as watcher:
            assert session.wait_published(T)
            wait_fleet(watcher, fresh)
        store.close()

    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    before = threads()
    once()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        once()
    deadline = time.monotonic() + T
    # gRPC closes sockets and ends its own threads a moment after their calls.
    while (len(os.listdir("/proc/self/fd")) > descriptors or threads() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() - before == set()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_etcd_that_is_not_there_is_named() -> None:
    store = open_store("http://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"cannot reach etcd at http://127\.0\.0\.1:1; check --etcd"):
        store.check(2)
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.check(2)
