"""The session's thread and mailbox, on a store in memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

import hma_serve.registry
from hma_serve.core.errors import InvalidArgument, Unavailable
from hma_serve.core.worker import WorkerRole, WorkerState
from hma_serve.registry import MemoryStore, Session, SessionState, SessionStatus, decode_record, record_key
from support.worker_records import a_worker


def test_a_session_registers_updates_and_goes() -> None:
    store, info = MemoryStore(), a_worker()
    with Session(store, info) as session:
        assert session.wait_published(10)
        assert session.status.routable
        assert session.info == replace(info, epoch=1)
        session.update(replace(session.info, state=WorkerState.DRAINING))
        assert session.wait_published(10)
        entry = store.get(record_key(info), 1)
        assert entry is not None
        assert decode_record(entry.value).state is WorkerState.DRAINING
    assert store.get(record_key(info), 1) is None
    assert session.status.state is SessionState.CLOSED
    assert not session.status.routable


def test_every_change_of_state_is_reported_once() -> None:
    store, info, seen = MemoryStore(), a_worker(), list[SessionStatus]()
    lost, again = threading.Event(), threading.Event()

    def note(status: SessionStatus) -> None:
        seen.append(status)
        if status.state is SessionState.LOST:
            lost.set()
        if status.epoch == 2 and status.state is SessionState.REGISTERED:
            again.set()

    with Session(store, info, ttl=300, on_status=note) as session:
        assert session.wait_published(10)
        entry = store.get(record_key(info), 1)
        assert entry is not None
        store.revoke(entry.lease, 1)
        # A write notices before the next renewal would.
        session.update(replace(info, profile="bf16"))
        assert lost.wait(10)
        assert again.wait(10)
    assert [(status.state, status.epoch) for status in seen] == [
        (SessionState.REGISTERED, 1),
        (SessionState.LOST, 1),
        (SessionState.REGISTERED, 2),
        (SessionState.CLOSED, 2),
    ]
    assert [bool(status.error) for status in seen] == [False, True, False, False]


def test_the_newest_of_many_updates_counts() -> None:
    store, info = MemoryStore(), a_worker()
    with Session(store, info) as session:
        for number in range(50):
            session.update(replace(info, profile=f"p{number}"))
        assert session.wait_published(10)
        entry = store.get(record_key(info), 1)
        assert entry is not None
        assert decode_record(entry.value).profile == "p49"


def test_a_store_that_is_away_fails_the_wait_and_not_the_process() -> None:
    store = MemoryStore()
    store.close()
    with Session(store, a_worker()) as session:
        assert not session.wait_published(0.05)
        assert session.status.state is SessionState.STARTING


def test_a_defect_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("hma_serve.registry.session._CRASH_WAIT", 0.01)
    store, grant, failed = MemoryStore(), MemoryStore.grant, threading.Event()

    def flawed(self: MemoryStore, ttl: float, timeout: float) -> object:
        if not failed.is_set():
            failed.set()
            raise ZeroDivisionError
        return grant(self, ttl, timeout)

    monkeypatch.setattr(MemoryStore, "grant", flawed)
    with Session(store, a_worker()) as session:
        assert session.wait_published(10)
    assert "failed unexpectedly" in caplog.text


def test_a_lease_that_nobody_renews_is_not_believed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now, stuck = MemoryStore(), [1000.0], threading.Event()
    asked = threading.Event()

    def never(lease: int, timeout: float) -> float:
        asked.set()
        stuck.wait(10)
        raise Unavailable("too late")

    with Session(store, a_worker(), ttl=0.3, clock=lambda: now[0]) as session:
        assert session.wait_published(10)
        monkeypatch.setattr(store, "keep_alive", never)
        now[0] += 0.2
        assert asked.wait(10)
        assert session.status.routable
        now[0] += 0.2
        assert session.status.state is SessionState.LOST
        assert "silent" in session.status.error
        stuck.set()


async def test_an_event_loop_can_wait_and_close() -> None:
    store, info = MemoryStore(), a_worker(WorkerRole.PREFILL)
    async with Session(store, info) as session:
        assert await session.published(10)
    assert store.get(record_key(info), 1) is None
    await session.aclose()


def test_a_session_is_of_one_instance() -> None:
    session = Session(MemoryStore(), a_worker(instance="a"))
    with pytest.raises(InvalidArgument, match="cannot register"):
        session.update(a_worker(instance="b"))


@pytest.mark.parametrize("ttl", [0.0, -1.0])
def test_a_lease_must_last(ttl: float) -> None:
    with pytest.raises(InvalidArgument, match="ends before it begins"):
        Session(MemoryStore(), a_worker(), ttl=ttl)


def test_exports_are_pinned() -> None:
    assert sorted(hma_serve.registry.__all__) == [
        "EtcdStore",
        "FleetSnapshot",
        "MemoryStore",
        "PREFIX",
        "ReadableStore",
        "Session",
        "SessionState",
        "SessionStatus",
        "StaticFileStore",
        "Store",
        "Tls",
        "Watcher",
        "decode_record",
        "encode_record",
        "open_readable_store",
        "open_store",
        "record_key",
    ]
