"""The engine's steps without a model: failures, a step ahead of the host, and overcommitted memory."""

import pytest
import torch

from hma_serve.decode.pages import Reservation
from hma_serve.decode.runner import DrawnTokens
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.v1 import common_pb2
from support.engine_harness import (
    ROLES,
    Harness,
    NextNumberStep,
    admit,
    attach,
    block,
    close,
    end_push,
    outputs,
)


def test_a_step_that_fails_ends_its_own_streams_and_no_other() -> None:
    harness = Harness()
    harness.admit(1)  # waits for its KV, so it takes no part in the step
    harness.runner.fails = True
    events = harness.turn(admit(2, prompt=20, packed=0))
    detail = harness.failure(events)
    assert detail.code == "internal"
    assert "device" not in detail.message
    harness.runner.fails = False
    events = harness.turn(admit(3, prompt=20, packed=0, max_tokens=1))
    assert events[-1].step.outputs[0].finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert harness.pool.used_tokens > 0  # stream 1 still holds its pages


def test_an_engine_that_only_fails_leaves() -> None:
    harness = Harness()
    harness.runner.fails = True
    with pytest.raises(RuntimeError, match="the device said no"):
        for stream in range(100):
            harness.turn(admit(stream, prompt=20, packed=0))


def test_a_step_ahead_gives_the_same_tokens_and_ends() -> None:
    said: list[list[tuple[int, int]]] = []
    for overlap in (False, True):
        harness = Harness(max_running=8, overlap=overlap)
        produced = outputs(
            harness.turn(*(admit(stream, 5 + 20 * stream, 0, max_tokens=3 + stream) for stream in range(6)))
        )
        while harness.patience == 0:
            produced += outputs(harness.turn())
        harness.pool.check_integrity()
        assert harness.pool.used_tokens == 0
        assert sum(output.HasField("finished") for output in produced) == 6
        said.append(sorted((output.stream, token) for output in produced for token in output.tokens.token_ids))
    assert said[0] == said[1]
    assert len(said[0]) == sum(3 + stream for stream in range(6))


def test_a_step_ahead_throws_away_what_follows_the_end() -> None:
    harness = Harness(overlap=True)
    # The third token is the stop token: by the time the host knows, the device has begun with a fourth.
    produced = outputs(harness.turn(admit(1, 5, 0, max_tokens=10, stop_token=17)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert [token for output in produced for token in output.tokens.token_ids] == [15, 16]
    assert produced[-1].finished.stop_token_id == 17
    assert harness.runner.steps == [[(1, 5)], [(1, 1)], [(1, 1)], [(1, 1)]]
    assert harness.pool.used_tokens == 0


def test_a_step_ahead_takes_from_token_to_token_whatever_the_host_did_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness, drawn = Harness(overlap=True), NextNumberStep.drawn

    def after_a_wait(step: NextNumberStep) -> DrawnTokens:
        harness.now += 0.003  # what is left of the step
        return drawn(step)

    monkeypatch.setattr(NextNumberStep, "drawn", after_a_wait)

    def step_seconds(stream: int) -> list[float]:
        seconds = []
        harness.turn(admit(stream, 5, 0, max_tokens=400))
        for _ in range(100):
            harness.now += 0.002  # KV that arrives
            harness.turn()
            seconds += [event.load.step_seconds for event in harness.events if event.HasField("load")]
        harness.turn(close(stream))
        harness.turn()
        return seconds

    assert step_seconds(1)[-1] == pytest.approx(0.005, rel=0.01)
    harness.now += 60  # A pause is no step.
    assert step_seconds(2)[-1] == pytest.approx(0.005, rel=0.01)


def test_slots_are_given_back_when_what_was_in_them_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, log = Harness(), []
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    monkeypatch.setattr(harness.intake, "settle", lambda: log.append("settled"))
    monkeypatch.setattr(
        harness.engine, "_emit", lambda *events: log.extend(str(event.WhichOneof("event")) for event in events)
    )
    harness.engine.turn([block(9, 0, 0, ROLES[0], 0, 2)])
    assert log.index("settled") < log.index("landed")


def test_pages_change_hands_only_when_no_step_uses_them() -> None:
    harness = Harness(overlap=True)
    harness.turn(admit(1, 5, 0, max_tokens=100))
    harness.turn()
    harness.turn(close(1))
    # The step that was ahead when the stream was closed is over now, and nothing else ran.
    assert harness.pool.used_tokens == 0
    assert harness.turn() == []
    assert harness.patience is None
    steps = len(harness.runner.steps)
    harness.turn(admit(2, 5, 0, max_tokens=100))
    harness.engine._receive(close(2))
    assert harness.pool.used_tokens > 0  # the device may still write there
    harness.turn()
    assert harness.pool.used_tokens == 0
    assert len(harness.runner.steps) == steps + 1


def test_pages_are_free_only_when_the_device_has_let_go_of_them_though_a_step_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(overlap=True)
    log: list[str] = []
    harness.turn(admit(1, 5, 0, max_tokens=100))
    drawn, free = NextNumberStep.drawn, harness.pool.free

    def waited(step: NextNumberStep) -> DrawnTokens:
        log.append("drawn")
        return drawn(step)

    def freed(pages: Reservation) -> None:
        log.append("free")
        free(pages)

    monkeypatch.setattr(NextNumberStep, "drawn", waited)
    monkeypatch.setattr(harness.pool, "free", freed)
    harness.runner.fails = True
    harness.turn()
    assert log == ["drawn", "free"]


def test_a_failure_ends_everyone_in_the_steps_under_way() -> None:
    harness = Harness(overlap=True)
    harness.turn(admit(1, 5, 0, max_tokens=100))
    harness.runner.fails = True
    events = harness.turn(admit(2, 5, 0, max_tokens=100))
    assert {event.failed.stream for event in events if event.HasField("failed")} == {1, 2}
    assert harness.pool.used_tokens == 0
    harness.pool.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_youngest_begins_again_when_overcommitted_memory_runs_out(overlap: bool) -> None:
    harness = Harness(capacity=320, max_running=9, overlap=overlap, overcommit=True)
    lengths = {stream: 210 - stream for stream in range(1, 7)}
    produced: dict[int, list[int]] = {stream: [] for stream in lengths}
    emit = harness.engine._emit

    def note(*events: pb.DecodeEngineEvent) -> None:
        for output in outputs(list(events)):
            produced[output.stream] += output.tokens.token_ids
        emit(*events)

    harness.engine._emit = note
    for stream, length in lengths.items():
        nonce = harness.admit(stream, max_tokens=length)
        harness.turn(attach(10 + stream, nonce))
        harness.fill(10 + stream)
        harness.turn(end_push(10 + stream))
    packed = {number: each.sequence.pages.packed_k for number, each in harness.engine._streams.items()}
    preempted: set[int] = set()
    free = harness.pool.capacity_tokens
    steps_before = harness.runner.steps.copy()
    while harness.patience == 0:
        harness.turn()
        free = next((event.load.kv_free_tokens for event in reversed(harness.events) if event.HasField("load")), free)
        harness.pool.check_integrity()
        running = {sequence.stream for sequence in harness.engine._scheduler}
        for number in harness.engine._streams.keys() - running:
            if not preempted:
                assert free == 0
                assert harness.failure(harness.turn(admit(9, 70, 64))).code == "resource_exhausted"
            preempted.add(number)
            # Its packed prompt stays where it was.
            assert torch.equal(harness.engine._streams[number].sequence.pages.packed_k, packed[number])
    assert 6 in preempted
    assert 1 not in preempted
    # Nothing twice, nothing left out.
    assert produced == {stream: list(range(80, 80 + length)) for stream, length in lengths.items()}
    assert harness.pool.used_tokens == 0
    replayed = {stream for step in harness.runner.steps[len(steps_before) :] for stream, count in step if count > 1}
    assert replayed == preempted
    assert harness.engine._commitment.pauses >= len(preempted)


def test_low_priorities_make_room_first_and_come_back_last() -> None:
    harness = Harness(capacity=320, max_running=9, overcommit=True)
    priorities = {1: 0, 2: 1, 3: 0, 4: 1, 5: 1, 6: 2}
    for stream, priority in priorities.items():
        nonce = harness.admit(stream, max_tokens=200, priority=priority)
        harness.turn(attach(10 + stream, nonce))
        harness.fill(10 + stream)
        harness.turn(end_push(10 + stream))
    paused: list[int] = []
    resumed: list[int] = []
    while harness.patience == 0:
        harness.turn()
        out = harness.engine._streams.keys() - {sequence.stream for sequence in harness.engine._scheduler}
        paused += [stream for stream in out if stream not in paused]
        resumed += [stream for stream in paused if stream not in out and stream not in resumed]
    assert paused[0] == 3
    assert 6 not in paused
    levels = [priorities[stream] for stream in paused]
    assert levels == sorted(levels)
    assert [priorities[stream] for stream in resumed] == sorted((priorities[s] for s in resumed), reverse=True)
    assert harness.pool.used_tokens == 0


def test_overcommitted_memory_is_promised_only_as_far_as_each_could_finish() -> None:
    harness = Harness(capacity=320, overcommit=True)
    # Three extents: packed pages of the first take one, and its output may come to fill the other two.
    harness.admit(1, max_tokens=1000)
    assert harness.pool.can_reserve(harness.engine._streams[1].sequence.pages.need, (), 1)
    # There are pages for this one now, but then the first could never finish.
    error = harness.failure(harness.turn(admit(2, 70 + 62 * 32, 64 * 32)))
    assert error.code == "resource_exhausted"
    harness.admit(3)
    harness.turn(close(1), close(3))
    harness.admit(2, 70 + 62 * 32, 64 * 32)
