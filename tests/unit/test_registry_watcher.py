"""Following the fleet, with a store that plays a script."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import pytest

from hma_serve.core.errors import HmaError, PermissionDenied, Unavailable
from hma_serve.core.worker import WorkerInfo, WorkerRole
from hma_serve.registry import FleetSnapshot, MemoryStore, Watcher, encode_record, record_key
from hma_serve.registry.store import Batch, Compacted, Entry, Event, Listing
from support.worker_records import a_worker, wait_fleet


def entry(info: WorkerInfo, revision: int = 1) -> Entry:
    return Entry(record_key(info), encode_record(info), revision, 0)


def put(info: WorkerInfo, revision: int) -> Event:
    return Event(record_key(info), entry(info, revision))


class ScriptedStore:
    """Answers `list` and `watch` with what the test queues, and notes where each watch started."""

    def __init__(self) -> None:
        self.listings: queue.Queue[Listing | HmaError] = queue.Queue()
        self.batches: queue.Queue[Batch | HmaError | None] = queue.Queue()
        self.watched_from: list[int] = []
        self.lists = 0

    def check(self, timeout: float) -> None:
        raise NotImplementedError

    def get(self, key: str, timeout: float) -> Entry | None:
        raise NotImplementedError

    def list(self, prefix: str, timeout: float) -> Listing:
        self.lists += 1
        listing = self.listings.get(timeout=10)
        if isinstance(listing, HmaError):
            raise listing
        return listing

    def watch(self, prefix: str, start_revision: int) -> ScriptedWatch:
        self.watched_from.append(start_revision)
        return ScriptedWatch(self.batches)

    def close(self) -> None:
        raise NotImplementedError


class ScriptedWatch:
    def __init__(self, batches: queue.Queue[Batch | HmaError | None]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._batches.get(timeout=10)) is not None:
            if isinstance(batch, HmaError):
                raise batch
            yield batch

    def close(self) -> None:
        self._batches.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


@pytest.fixture
def store() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture
def watcher(store: ScriptedStore) -> Iterator[Watcher]:
    with Watcher(store, jitter=lambda: 0.0) as watcher:
        yield watcher
        # For a thread that waits for its script.
        store.listings.put(Unavailable("the test is over"))


def names(snapshot: FleetSnapshot) -> list[str]:
    return sorted(snapshot.workers)


def test_before_the_first_list_nothing_is_known(store: ScriptedStore) -> None:
    snapshot = Watcher(store).current
    assert not snapshot.listed
    assert snapshot.stale_since is not None
    assert not snapshot.workers


def test_an_empty_fleet_is_listed_too(store: ScriptedStore, watcher: Watcher) -> None:
    store.listings.put(Listing(7, ()))
    snapshot = watcher.wait_listed_blocking(10)
    assert snapshot.listed
    assert (snapshot.revision, snapshot.stale_since) == (7, None)


def test_list_then_watch_from_the_next_revision(store: ScriptedStore, watcher: Watcher) -> None:
    one, two = a_worker(instance="w1"), a_worker(WorkerRole.PREFILL, "w2")
    store.listings.put(Listing(41, (entry(one),)))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1"])
    store.batches.put(Batch((put(two, 42),), 43))
    fleet = wait_fleet(watcher, lambda fleet: names(fleet) == ["w1", "w2"])
    assert fleet.with_role(WorkerRole.PREFILL) == (two,)
    assert fleet.with_role(WorkerRole.DECODE) == (one,)
    store.batches.put(Batch((Event(record_key(one), None),), 44))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w2"])
    assert store.watched_from == [42]


def test_a_broken_watch_goes_on_after_the_last_event_and_keeps_the_fleet(
    store: ScriptedStore, watcher: Watcher
) -> None:
    one, two = a_worker(instance="w1"), a_worker(instance="w2")
    store.listings.put(Listing(10, (entry(one),)))
    store.batches.put(Batch((put(two, 15),), 16))
    # A sign of life moves nothing.
    store.batches.put(Batch())
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1", "w2"])
    store.batches.put(Unavailable("cut"))
    stale = wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
    assert names(stale) == ["w1", "w2"]
    store.batches.put(Batch())
    wait_fleet(watcher, lambda fleet: fleet.stale_since is None)
    assert store.watched_from == [11, 16]
    assert store.lists == 1


def test_progress_moves_the_point_to_resume_from(store: ScriptedStore, watcher: Watcher) -> None:
    store.listings.put(Listing(10, ()))
    store.batches.put(Batch(resume=90))
    store.batches.put(Unavailable("cut"))
    store.batches.put(Batch((put(a_worker(instance="w1"), 95),), 96))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1"])
    assert store.watched_from == [11, 90]


def test_after_a_compaction_vanished_keys_vanish(store: ScriptedStore, watcher: Watcher) -> None:
    gone, stays, new = a_worker(instance="gone"), a_worker(instance="stays"), a_worker(instance="new")
    store.listings.put(Listing(10, (entry(gone), entry(stays))))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["gone", "stays"])
    store.batches.put(Compacted("up to 500"))
    store.listings.put(Listing(600, (entry(stays), entry(new))))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["new", "stays"])
    store.batches.put(Batch((put(gone, 601),), 602))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["gone", "new", "stays"])
    assert store.watched_from == [11, 601]


def test_any_other_refusal_lists_again(store: ScriptedStore, watcher: Watcher) -> None:
    store.listings.put(Listing(10, ()))
    store.batches.put(PermissionDenied("no"))
    store.listings.put(Listing(20, (entry(a_worker(instance="w1")),)))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1"])


def test_a_store_that_is_away_at_the_start_is_asked_again(store: ScriptedStore, watcher: Watcher) -> None:
    store.listings.put(Unavailable("not yet"))
    with pytest.raises(Unavailable, match="--etcd"):
        watcher.wait_listed_blocking(0.01)
    store.listings.put(Listing(1, ()))
    assert watcher.wait_listed_blocking(10).listed


def test_a_bad_record_is_skipped_and_counted(store: ScriptedStore, watcher: Watcher) -> None:
    good, bad = a_worker(instance="good"), a_worker(instance="bad")
    store.listings.put(Listing(10, (entry(good), Entry(record_key(bad), b"{broken", 9, 0))))
    fleet = watcher.wait_listed_blocking(10)
    assert (names(fleet), fleet.bad_records) == (["good"], 1)
    store.batches.put(Batch((put(bad, 11),), 12))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["bad", "good"] and fleet.bad_records == 0)
    # A good record that turns bad is not routable any more.
    store.batches.put(Batch((Event(record_key(bad), Entry(record_key(bad), b"?", 12, 0)),), 13))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["good"] and fleet.bad_records == 1)
    store.batches.put(Batch((Event(record_key(bad), None),), 14))
    wait_fleet(watcher, lambda fleet: fleet.bad_records == 0)


def test_a_record_under_another_ones_key_is_bad(store: ScriptedStore, watcher: Watcher) -> None:
    info = a_worker(instance="real")
    store.listings.put(Listing(10, (Entry(record_key(replace(info, instance="fake")), encode_record(info), 9, 0),)))
    fleet = watcher.wait_listed_blocking(10)
    assert (names(fleet), fleet.bad_records) == ([], 1)


def test_snapshots_do_not_change(store: ScriptedStore, watcher: Watcher) -> None:
    store.listings.put(Listing(10, (entry(a_worker(instance="w1")),)))
    before = watcher.wait_listed_blocking(10)
    store.batches.put(Batch((put(a_worker(instance="w2"), 11),), 12))
    wait_fleet(watcher, lambda fleet: len(fleet.workers) == 2)
    assert names(before) == ["w1"]
    with pytest.raises(TypeError):
        before.workers["w3"] = a_worker()  # type: ignore[index]


def test_it_lists_again_now_and_then_although_nothing_is_wrong(store: ScriptedStore) -> None:
    store.listings.put(Listing(10, ()))
    store.listings.put(Listing(20, (entry(a_worker(instance="missed")),)))
    with Watcher(store, relist=0.0) as watcher:
        store.batches.put(Batch())
        wait_fleet(watcher, lambda fleet: names(fleet) == ["missed"])
        store.listings.put(Unavailable("the test is over"))


def test_a_failing_subscriber_disturbs_nobody(
    store: ScriptedStore, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(snapshot: FleetSnapshot) -> None:
        raise RuntimeError("mine")

    watcher.subscribe(fail)
    store.listings.put(Listing(10, (entry(a_worker(instance="w1")),)))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1"])
    assert "a subscriber to the fleet failed" in caplog.text


async def test_a_loop_gets_the_newest_snapshot_once_for_all_changes() -> None:
    store = MemoryStore()
    seen: list[list[str]] = []
    async with Watcher(store) as watcher:
        await watcher.wait_listed(10)
        unsubscribe = watcher.subscribe(lambda fleet: seen.append(names(fleet)), asyncio.get_running_loop())
        for number in range(5):
            info = a_worker(instance=f"w{number}")
            store.put(record_key(info), encode_record(info))
        # The loop is busy (that is, here) until the thread has seen all five.
        wait_fleet(watcher, lambda fleet: len(fleet.workers) == 5)
        assert seen == []
        await asyncio.sleep(0)
        assert seen == [["w0", "w1", "w2", "w3", "w4"]]
        store.delete(record_key(a_worker(instance="w0")))
        wait_fleet(watcher, lambda fleet: len(fleet.workers) == 4)
        await asyncio.sleep(0)
        assert seen[1:] == [["w1", "w2", "w3", "w4"]]
        unsubscribe()
        unsubscribe()
        store.delete(record_key(a_worker(instance="w1")))
        wait_fleet(watcher, lambda fleet: len(fleet.workers) == 3)
        await asyncio.sleep(0)
        assert len(seen) == 2


def test_a_subscriber_whose_loop_has_ended_is_left_alone(store: ScriptedStore, watcher: Watcher) -> None:
    loop = asyncio.new_event_loop()
    watcher.subscribe(lambda _: None, loop)
    loop.close()
    store.listings.put(Listing(10, (entry(a_worker(instance="w1")),)))
    wait_fleet(watcher, lambda fleet: names(fleet) == ["w1"])


async def test_waiting_for_the_list_ends_in_time(store: ScriptedStore) -> None:
    watcher = Watcher(store)
    with pytest.raises(Unavailable, match=r"0\.01 s"):
        await watcher.wait_listed(0.01)


def test_closing_is_idempotent_and_ends_the_thread() -> None:
    watcher = Watcher(MemoryStore(pulse=60))
    watcher.start()
    watcher.wait_listed_blocking(10)
    watcher.close()
    watcher.close()
    assert not watcher._thread.is_alive()
