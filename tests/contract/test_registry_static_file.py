"""The reading half of the contract, on a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hma_serve.core.errors import Unavailable
from hma_serve.core.worker import WorkerInfo
from hma_serve.registry import StaticFileStore, Watcher, encode_record, record_key
from hma_serve.registry.records import PREFIX
from hma_serve.registry.static_file import MAX_FILE_BYTES
from support.worker_records import a_worker, wait_fleet

T = 5.0


def write(path: Path, *workers: WorkerInfo, junk: tuple[object, ...] = ()) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps([*(json.loads(encode_record(worker)) for worker in workers), *junk]))
    scratch.replace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.json"


@pytest.fixture
def store(path: Path) -> Iterator[StaticFileStore]:
    store = StaticFileStore(path, poll=0.02)
    yield store
    store.close()


def test_the_file_is_the_fleet(path: Path, store: StaticFileStore) -> None:
    one, two = a_worker(instance="a"), a_worker(instance="b")
    write(path, two, one)
    store.check(T)
    assert [entry.key for entry in store.list(PREFIX, T).entries] == [record_key(one), record_key(two)]
    entry = store.get(record_key(one), T)
    assert entry is not None
    assert store.get(record_key(a_worker()), T) is None


def test_changes_of_the_file_are_changes_of_the_fleet(path: Path, store: StaticFileStore) -> None:
    goes, stays, comes = a_worker(), a_worker(), a_worker()
    write(path, goes, stays)
    with Watcher(store) as watcher:
        fleet = wait_fleet(watcher, lambda fleet: len(fleet.workers) == 2)
        write(path, stays, comes)
        fleet = wait_fleet(watcher, lambda fleet: comes.instance in fleet.workers)
        fleet = wait_fleet(watcher, lambda fleet: goes.instance not in fleet.workers)
        assert fleet.workers == {stays.instance: stays, comes.instance: comes}


def test_an_unchanged_record_is_no_event(path: Path, store: StaticFileStore) -> None:
    stays, comes = a_worker(), a_worker()
    write(path, stays)
    start = store.list(PREFIX, T).revision + 1
    write(path, comes, stays)
    store.refresh()
    with store.watch(PREFIX, start) as stream:
        (event,) = next(iter(stream)).events
    assert event.key == record_key(comes)


@pytest.mark.parametrize("content", ["", "{", "{}", "[" * 100_000, "\0"])
def test_a_broken_file_leaves_the_last_fleet(path: Path, store: StaticFileStore, content: str) -> None:
    info = a_worker()
    write(path, info)
    with Watcher(store) as watcher:
        wait_fleet(watcher, lambda fleet: info.instance in fleet.workers)
        path.write_text(content)
        fleet = wait_fleet(watcher, lambda fleet: fleet.stale_since is not None)
        assert fleet.workers.keys() == {info.instance}
        write(path)
        wait_fleet(watcher, lambda fleet: fleet.stale_since is None and not fleet.workers)


def test_a_missing_file_is_named(path: Path, store: StaticFileStore) -> None:
    with pytest.raises(Unavailable, match=r"fleet\.json"):
        store.check(T)


def test_a_file_is_measured_before_it_is_read(path: Path, store: StaticFileStore) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(Unavailable, match="more than"):
        store.check(T)


def test_broken_records_are_counted_and_the_others_served(path: Path, store: StaticFileStore) -> None:
    info = a_worker()
    write(path, info, junk=(7, None, {"instance": "half"}))
    with Watcher(store) as watcher:
        fleet = watcher.wait_listed_blocking(T)
        assert fleet.workers == {info.instance: info}
        assert fleet.bad_records == 3
