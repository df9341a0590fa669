"""The engine without a model: admission, tickets, blocks, steps and clean-up, by its messages alone."""

from collections.abc import Callable, Iterator

import pytest
import torch

from hma_serve.core.errors import Internal
from hma_serve.core.worker import WorkerLimits
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import Need
from hma_serve.internal.v1 import decode_engine_pb2 as pb
from hma_serve.router.placement import Demand
from hma_serve.v1 import common_pb2
from support.engine_harness import (
    KV_HEADS,
    LAYERS,
    LEASE,
    ROLES,
    UNIT,
    Harness,
    admit,
    attach,
    block,
    close,
    detach,
    end_push,
    marker,
    outputs,
)


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.pool.check_integrity()
    made.arena.close()


def test_a_prompt_without_packed_tokens_runs_at_once(harness: Harness) -> None:
    produced = outputs(harness.turn(admit(1, 5, 0)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert produced[0].HasField("started")
    assert [token for output in produced for token in output.tokens.token_ids] == [15, 16, 17, 18]
    finished = produced[-1].finished
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 4)
    assert harness.pool.used_tokens == 0
    assert harness.patience is None


def test_nothing_is_sampled_before_the_commit(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    landed = harness.fill(9)
    assert [event.WhichOneof("event") for event in landed] == ["landed"] * (LAYERS * 2 * KV_HEADS)
    assert harness.runner.steps == []
    events = harness.turn(end_push(9))
    assert [event.WhichOneof("event") for event in events] == ["committed", "step"]
    # The packed tokens are not computed again: only the last six of the prompt are.
    assert harness.runner.steps == [[(1, 6)]]
    assert list(outputs(events)[0].tokens.token_ids) == [80]


def test_blocks_land_in_the_pages_byte_for_byte(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.fill(9)
    pages = harness.engine._streams[1].sequence.pages
    for layer in range(LAYERS):
        for role, kind, places in zip(ROLES, Role, (pages.packed_k, pages.packed_v), strict=True):
            stored = harness.pool.packed("tt_bfp8_b", kind, layer)[places]
            for head in range(KV_HEADS):
                assert (stored[:, head] == marker(layer, role, head)).all()


def test_a_hole_is_never_committed(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.fill(9, skip_last=True)
    assert harness.failure(harness.turn(end_push(9)), "push_failed").code == "data_loss"
    assert harness.runner.steps == []
    # The ticket is empty again: another stream of the same attempt may fill it from the start.
    harness.turn(detach(9), attach(10, nonce))
    harness.fill(10)
    assert harness.turn(end_push(10))[0].HasField("committed")


def test_late_blocks_of_a_dead_stream_are_dropped(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    harness.turn(detach(9), attach(10, nonce))
    harness.fill(10)
    harness.arena.slot(1, 2 * UNIT)[:] = b"\xee" * (2 * UNIT)
    (landed,) = harness.turn(block(9, 1, 0, ROLES[0], 0, 2))
    assert landed.landed.slot == 1
    (late,) = [event.load.late_blocks for event in harness.events if event.HasField("load")]
    assert late == 1
    pages = harness.engine._streams[1].sequence.pages
    assert (harness.pool.packed("tt_bfp8_b", Role.K, 0)[pages.packed_k][:, 0] == marker(0, ROLES[0], 0)).all()
    assert harness.turn(end_push(9)) == []
    assert harness.turn(end_push(10))[0].HasField("committed")


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (lambda nonce: attach(9, bytes(16)), "not_found", "ticket"),
        (lambda nonce: attach(9, nonce, epoch=2), "failed_precondition", "epoch"),
        (lambda nonce: attach(9, nonce, tokens=32), "failed_precondition", "manifest.token_count"),
        (lambda nonce: attach(9, nonce, v_codec="f32"), "failed_precondition", "manifest.codecs"),
    ],
)
def test_foreign_streams_are_refused(
    harness: Harness, change: Callable[[bytes], pb.DecodeEngineCommand], code: str, field: str
) -> None:
    nonce = harness.admit(1)
    error = harness.failure(harness.turn(change(nonce)), "push_failed")
    assert (error.code, error.field) == (code, field)
    assert [event.WhichOneof("event") for event in harness.turn(attach(10, nonce))] == ["attached"]


def test_a_second_stream_for_a_ticket_is_refused(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    assert harness.failure(harness.turn(attach(10, nonce)), "push_failed").code == "failed_precondition"


def test_full_is_said_at_once(harness: Harness) -> None:
    for stream in (1, 2, 3):
        harness.admit(stream)
    error = harness.failure(harness.turn(admit(4, 70, 64)))
    assert error.code == "resource_exhausted"
    assert error.retry_after_seconds > 0
    harness.turn(close(2))
    harness.admit(5)


def test_a_prefix_that_is_here_need_not_come_again(harness: Harness) -> None:
    keys = [b"first", b"second", b"third"]
    nonce = harness.admit(1, keys=keys[:2])
    harness.turn(attach(9, nonce))
    harness.fill(9)
    harness.turn(end_push(9))
    pages = harness.engine._streams[1].sequence.pages
    # A longer prompt with the same beginning: only its last group is missing, and only that is taken.
    (event,) = [e for e in harness.turn(admit(2, 100, 96, keys=keys)) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 64
    longer = harness.engine._streams[2].sequence.pages
    assert torch.equal(longer.packed_k[:2], pages.packed_k)
    refused = harness.turn(attach(10, event.admitted.nonce, tokens=96))
    assert harness.failure(refused, "push_failed").field == "manifest.token_count"
    harness.turn(attach(11, event.admitted.nonce, start=64, tokens=32))
    harness.fill(11, groups=1)
    assert harness.turn(end_push(11))[0].HasField("committed")
    # The whole prompt is here: it runs at once, also after the others have gone.
    harness.turn(close(1), close(2))
    assert harness.pool.used_tokens == 0
    events = harness.turn(admit(3, 100, 96, keys=keys))
    (event,) = [e for e in events if e.HasField("admitted")]
    assert event.admitted.present_tokens == 96
    assert [e.WhichOneof("event") for e in events] == ["admitted", "step"]
    # Other keys, for example another tenant's, find nothing.
    (event,) = [e for e in harness.turn(admit(4, 70, 64, keys=[b"x", b"y"])) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 0


def test_a_prefix_that_did_not_become_complete_is_not_shared(harness: Harness) -> None:
    keys = [b"first", b"second"]
    nonce = harness.admit(1, keys=keys)
    harness.turn(attach(9, nonce))
    harness.fill(9, skip_last=True)
    harness.turn(end_push(9), close(1))
    (event,) = [e for e in harness.turn(admit(2, 70, 64, keys=keys)) if e.HasField("admitted")]
    assert event.admitted.present_tokens == 0


def test_memory_is_reserved_before_admission(harness: Harness) -> None:
    capacity = harness.pool.capacity_tokens
    harness.admit(1, max_tokens=capacity * 5 // 8)
    assert harness.failure(harness.turn(admit(2, 70, 64, max_tokens=capacity * 5 // 8))).code == "resource_exhausted"
    assert harness.failure(harness.turn(admit(3, 70, 64, max_tokens=2 * capacity))).code == "failed_precondition"


def test_a_lease_that_runs_out_fails_the_stream_also_when_idle(harness: Harness) -> None:
    harness.admit(1)
    assert harness.patience == LEASE
    harness.now += LEASE
    assert harness.failure(harness.turn()).code == "unavailable"
    assert harness.pool.used_tokens == 0


def test_arriving_blocks_and_extend_renew_the_lease(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    for _ in range(4):
        harness.now += LEASE - 1
        assert harness.turn(block(9, 0, 0, ROLES[0], 0, 2))[0].HasField("landed")
    harness.now += LEASE - 1
    call = pb.DecodeTicketCall(call=5, nonce=nonce, epoch=1)
    (answer,) = harness.turn(pb.DecodeEngineCommand(extend=call))
    assert answer.answer.lease_ns == int(LEASE * 1e9)
    harness.now += LEASE - 1
    assert harness.turn() == []


def test_release_ends_the_stream_and_its_push(harness: Harness) -> None:
    nonce = harness.admit(1)
    harness.turn(attach(9, nonce))
    call = pb.DecodeTicketCall(call=5, nonce=nonce, epoch=1)
    events = harness.turn(pb.DecodeEngineCommand(release=call))
    assert {event.WhichOneof("event") for event in events} == {"push_failed", "failed", "answer"}
    assert harness.pool.used_tokens == 0
    (again,) = harness.turn(pb.DecodeEngineCommand(release=call))
    assert again.answer.error.code == "not_found"


def test_a_deadline_ends_a_running_stream_between_steps(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0, max_tokens=100, deadline=harness.now + 10))
    assert outputs(harness.turn())
    harness.now += 10
    steps = len(harness.runner.steps)
    assert harness.failure(harness.turn()).code == "deadline_exceeded"
    assert len(harness.runner.steps) == steps
    assert harness.pool.used_tokens == 0


def test_equal_prompts_share_a_step_and_a_higher_priority_takes_it(harness: Harness) -> None:
    harness.turn(admit(1, 100, 0), admit(2, 100, 0))
    assert harness.runner.steps == [[(1, 32), (2, 32)]]
    harness.turn(admit(3, 100, 0, priority=1))
    assert harness.runner.steps[1] == [(3, 64)]
    harness.turn()
    # What the urgent one leaves is shared again.
    assert harness.runner.steps[2] == [(3, 36), (1, 14), (2, 14)]


def test_the_nearest_deadline_is_served_first(harness: Harness) -> None:
    harness.turn(admit(1, 33, 0), admit(2, 63, 0, deadline=harness.now + 9), admit(3, 33, 0, deadline=harness.now + 3))
    # Equal parts of 21; the one left over goes to the most urgent.
    assert harness.runner.steps == [[(3, 22), (2, 21), (1, 21)]]


def test_an_engine_that_has_become_idle_checks_its_pages(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0), admit(2, 70, 64))
    held = harness.pool.reserve(Need.of(packed_tokens=0, total_tokens=32, k_format="", v_format=""))
    # Nobody's any more, and not given back.
    harness.pool._reservations.remove(held)
    while harness.patience == 0:
        harness.turn()
    with pytest.raises(Internal):
        harness.turn(close(2))
    harness.pool._reservations.add(held)
    harness.pool.free(held)


def test_closing_frees_before_the_next_step(harness: Harness) -> None:
    harness.turn(admit(1, 5, 0, max_tokens=100), admit(2, 5, 0, max_tokens=100))
    harness.turn(close(1))
    assert harness.runner.steps[-1] == [(2, 1)]
    harness.turn(close(2))
    assert harness.pool.used_tokens == 0
    assert harness.turn(close(2)) == []


def test_emitted_tokens_are_computed_again_and_counted(harness: Harness) -> None:
    produced = outputs(harness.turn(admit(1, 5, 0, emitted=2)))
    while harness.patience == 0:
        produced += outputs(harness.turn())
    assert harness.runner.steps[0] == [(1, 7)]
    assert [token for output in produced for token in output.tokens.token_ids] == [17, 18]
    assert produced[-1].finished.usage.completion_tokens == 4


def test_a_long_prompt_is_announced_with_its_first_piece(harness: Harness) -> None:
    first = outputs(harness.turn(admit(1, 100, 0)))
    assert [output.HasField("started") for output in first] == [True]
    assert not first[0].HasField("tokens")
    second = outputs(harness.turn())
    assert not second[0].HasField("started")
    assert list(second[0].tokens.token_ids) == [110]


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_request_takes_as_much_memory_as_a_router_counts(overcommit: bool) -> None:
    limits = WorkerLimits(2000, 3, 0, 2000, overcommit=overcommit)
    for prompt, max_tokens, emitted in ((1, 31, 0), (32, 2, 0), (70, 300, 0), (70, 300, 57), (70, 300, 58)):
        harness = Harness(overcommit=overcommit)
        harness.turn(admit(1, prompt, 0, max_tokens=max_tokens, emitted=emitted))
        demand = Demand(prompt, max_tokens, emitted_tokens=emitted)
        assert harness.pool.used_tokens == demand.kv_tokens(limits)


def test_load_is_reported_when_it_changes(harness: Harness) -> None:
    harness.turn(admit(1, 70, 64))
    (load,) = [event.load for event in harness.events if event.HasField("load")]
    assert (load.running, load.waiting) == (0, 1)
    assert load.kv_used_tokens == harness.pool.used_tokens > 0
    assert load.kv_free_tokens == harness.pool.capacity_tokens - load.kv_used_tokens
    harness.turn()
    assert harness.events == []
    harness.turn(close(1))
    (load,) = [event.load for event in harness.events if event.HasField("load")]
    assert (load.running, load.waiting, load.kv_used_tokens) == (0, 0, 0)
