"""The decisions that keep an instance registered, on a clock of the test's own and a store that loses answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from hma_serve.core.errors import AlreadyExists, Unavailable
from hma_serve.core.worker import WorkerInfo, WorkerState
from hma_serve.registry import MemoryStore, SessionState, decode_record, encode_record, record_key
from hma_serve.registry.backoff import Backoff
from hma_serve.registry.registrar import Registrar, Step
from hma_serve.registry.store import Entry, Lease
from support.worker_records import a_worker

T = TypeVar("T")
TTL = 9.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FlakyStore(MemoryStore):
    """Counts calls with their time-outs; can be away, be slow, or lose the answer of a write that took effect."""

    def __init__(self, clock: Clock, min_ttl: float = 0.0) -> None:
        super().__init__(clock=clock, min_ttl=min_ttl)
        self.time = clock
        self.calls: list[tuple[str, float]] = []
        self.away = False
        self.latency = 0.0
        self.lose_answer_of = ""

    def grant(self, ttl: float, timeout: float) -> Lease:
        return self._attempt("grant", timeout, lambda: MemoryStore.grant(self, ttl, timeout))

    def keep_alive(self, lease: int, timeout: float) -> float:
        return self._attempt("keep_alive", timeout, lambda: MemoryStore.keep_alive(self, lease, timeout))

    def get(self, key: str, timeout: float) -> Entry | None:
        return self._attempt("get", timeout, lambda: MemoryStore.get(self, key, timeout))

    def create(self, key: str, value: bytes, lease: int, timeout: float) -> int:
        return self._attempt("create", timeout, lambda: MemoryStore.create(self, key, value, lease, timeout))

    def replace(self, key: str, value: bytes, lease: int, mod_revision: int, timeout: float) -> int:
        call = lambda: MemoryStore.replace(self, key, value, lease, mod_revision, timeout)  # noqa: E731
        return self._attempt("replace", timeout, call)

    def names(self) -> list[str]:
        names = [name for name, _ in self.calls]
        self.calls.clear()
        return names

    def _attempt(self, name: str, timeout: float, call: Callable[[], T]) -> T:
        self.calls.append((name, timeout))
        if self.away:
            raise Unavailable("away")
        result = call()
        self.time.now += self.latency
        if self.lose_answer_of == name:
            self.lose_answer_of = ""
            raise Unavailable("the answer was lost")
        return result


class Bench:
    """A registrar, its store and its clock."""

    def __init__(self, min_ttl: float = 0.0) -> None:
        self.clock = Clock()
        self.store = FlakyStore(self.clock, min_ttl)
        self.info = a_worker()
        self.key = record_key(self.info)
        self.registrar = Registrar(self.store, self.key, TTL, self.clock, lambda: 1.0)

    def step(self, info: WorkerInfo | None = None) -> Step:
        return self.registrar.step(info or self.info)

    def stored(self) -> Entry:
        entry = MemoryStore.get(self.store, self.key, 1)
        assert entry is not None
        return entry

    def record(self) -> WorkerInfo:
        return decode_record(self.stored().value)


def test_the_first_step_takes_a_lease_and_creates_the_key() -> None:
    bench = Bench()
    step = bench.step()
    assert bench.store.names() == ["grant", "get", "create"]
    assert step == Step(SessionState.REGISTERED, TTL / 3, published=True, error="")
    assert bench.record() == replace(bench.info, epoch=1)
    assert bench.stored().lease != 0


def test_a_lease_is_renewed_after_a_third_of_it() -> None:
    bench = Bench()
    wait = bench.step().wait
    bench.store.names()
    bench.clock.now += wait - 0.01
    bench.step()
    assert bench.store.names() == []
    bench.clock.now += 0.01
    assert bench.step().wait == pytest.approx(TTL / 3)
    assert bench.store.names() == ["keep_alive"]


def test_what_counts_is_the_ttl_that_the_server_granted() -> None:
    bench = Bench(min_ttl=60)
    assert bench.step().wait == pytest.approx(20)


def test_a_lease_counts_from_the_moment_of_the_request() -> None:
    bench = Bench()
    bench.step()
    bench.clock.now += TTL / 3
    bench.store.latency = 2.0
    step = bench.step()
    # Two seconds of the third have passed while the answer was on its way.
    assert step.wait == pytest.approx(TTL / 3 - 2)
    bench.store.away = True
    bench.clock.now += TTL - 2 - 0.01
    assert bench.step().state is SessionState.RETRYING
    bench.clock.now += 0.01
    assert bench.step().state is SessionState.LOST


def test_attempts_leave_room_for_others_before_the_lease_ends() -> None:
    bench = Bench()
    bench.step()
    bench.clock.now += TTL / 3
    ends = bench.clock.now + TTL * 2 / 3
    bench.store.away = True
    bench.store.calls.clear()
    while bench.clock.now < ends:
        before = len(bench.store.calls)
        step = bench.step()
        for _, timeout in bench.store.calls[before:]:
            assert timeout <= max((ends - bench.clock.now) / 3, TTL / 30) + 1e-9
        bench.clock.now += max(step.wait, 0.01)
    assert len(bench.store.calls) >= 4


def test_a_store_that_is_away_is_retried_until_the_lease_has_run_out_and_beyond() -> None:
    bench = Bench()
    bench.step()
    bench.clock.now += TTL / 3
    bench.store.away = True
    states = []
    for _ in range(40):
        step = bench.step()
        assert not step.published
        assert step.error == "away"
        assert 0 <= step.wait <= 2
        states.append(step.state)
        bench.clock.now += step.wait
    assert states[0] is SessionState.RETRYING
    assert states[-1] is SessionState.LOST
    assert states == sorted(states, key=[SessionState.RETRYING, SessionState.LOST].index)


def test_being_lost_is_noticed_when_it_happens_and_not_at_the_next_retry() -> None:
    bench = Bench()
    bench.step()
    bench.clock.now += TTL - 0.05
    bench.store.away = True
    bench.step()
    step = bench.step()
    assert step.state is SessionState.RETRYING
    assert step.wait <= 0.05 + 1e-9


def test_a_lost_lease_means_a_new_one_under_a_raised_epoch() -> None:
    bench = Bench()
    bench.step()
    bench.store.revoke(bench.stored().lease, 1)
    bench.clock.now += TTL / 3
    assert bench.step().state is SessionState.LOST
    assert bench.step().state is SessionState.REGISTERED
    assert bench.record().epoch == 2
    assert bench.store.names()[-3:] == ["grant", "get", "create"]


def test_a_lease_that_outlived_an_outage_is_kept_with_its_epoch() -> None:
    bench = Bench()
    bench.step()
    bench.store.away = True
    bench.clock.now += TTL - 1
    bench.step()
    # A new leader extends leases: what has run out by our reckoning may be alive over there.
    bench.store.away = False
    MemoryStore.keep_alive(bench.store, bench.stored().lease, 1)
    bench.clock.now += 2
    assert bench.step().state is SessionState.REGISTERED
    assert bench.record().epoch == 1


@pytest.mark.parametrize("lost", ["create", "replace"])
def test_a_write_whose_answer_was_lost_is_read_again_and_adopted(lost: str) -> None:
    bench = Bench()
    wanted = bench.info
    if lost == "replace":
        bench.step()
        wanted = replace(bench.info, state=WorkerState.DRAINING)
    bench.store.lose_answer_of = lost
    assert not bench.step(wanted).published
    revision = bench.stored().mod_revision
    bench.store.names()
    assert bench.step(wanted).published
    assert bench.store.names() == ["get"]
    assert bench.stored().mod_revision == revision
    assert bench.record() == replace(wanted, epoch=1)


def test_a_grant_whose_answer_was_lost_does_not_stop_the_next() -> None:
    bench = Bench()
    bench.store.lose_answer_of = "grant"
    assert bench.step().state is SessionState.STARTING
    assert bench.step().published
    assert bench.record().epoch == 1


def test_an_update_is_written_at_once_and_only_once() -> None:
    bench = Bench()
    bench.step()
    bench.store.names()
    draining = replace(bench.info, state=WorkerState.DRAINING)
    bench.step(draining)
    bench.step(draining)
    assert bench.store.names() == ["replace"]
    assert bench.record().state is WorkerState.DRAINING


def test_an_update_does_not_overwrite_what_it_has_not_seen() -> None:
    bench = Bench()
    bench.step()
    foreign = bench.store.put(bench.key, b"{}", bench.stored().lease)
    assert not bench.step(replace(bench.info, profile="bf16")).published
    assert bench.stored().mod_revision == foreign
    # Having read it, ours is put back: the key is ours.
    assert bench.step(replace(bench.info, profile="bf16")).published
    assert bench.record().profile == "bf16"


def test_a_key_deleted_behind_our_back_is_registered_again_within_a_ttl() -> None:
    bench = Bench()
    bench.step()
    bench.store.delete(bench.key)
    for _ in range(3):
        bench.clock.now += TTL / 3
        bench.step()
    assert bench.record().epoch == 2


def test_a_key_overwritten_behind_our_back_is_put_right_within_a_ttl() -> None:
    bench = Bench()
    bench.step()
    lease = bench.stored().lease
    bench.store.put(bench.key, b"{}")
    for _ in range(4):
        bench.clock.now += TTL / 3
        bench.step()
    # Somebody without our lease took the key: it is theirs until they let go.
    assert bench.stored().value == b"{}"
    bench.store.delete(bench.key)
    bench.step()
    assert bench.record().instance == bench.info.instance
    assert bench.stored().lease == lease


def test_a_name_that_is_taken_is_never_overwritten() -> None:
    bench = Bench()
    theirs = encode_record(replace(bench.info, address="10.0.0.9:1"))
    bench.store.put(bench.key, theirs)
    for _ in range(5):
        step = bench.step()
        assert step.state is SessionState.STARTING
        assert "somebody else" in step.error
    assert bench.stored().value == theirs


def test_a_race_for_the_key_is_lost_politely(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(FlakyStore, "get", lambda *_: None)
    bench.store.put(bench.key, b"{}")
    step = bench.step()
    assert not step.published
    with pytest.raises(AlreadyExists):
        MemoryStore.create(bench.store, bench.key, b"", bench.store.grant(1, 1).id, 1)


def test_closing_deletes_the_key_at_once() -> None:
    bench = Bench()
    bench.step()
    bench.registrar.revoke()
    assert MemoryStore.get(bench.store, bench.key, 1) is None
    bench.registrar.revoke()


def test_closing_without_a_store_is_no_error() -> None:
    bench = Bench()
    bench.step()
    bench.store.close()
    bench.registrar.revoke()


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_back_off_doubles_up_to_its_cap_with_jitter(jitter: float) -> None:
    backoff = Backoff(0.1, 1.0, lambda: jitter)
    waits = [backoff.next() for _ in range(6)]
    nominal = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert waits == pytest.approx([n * (0.5 + jitter / 2) for n in nominal])
    backoff.reset()
    assert backoff.next() == pytest.approx(0.1 * (0.5 + jitter / 2))
