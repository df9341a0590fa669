"""Scheduling and sequences: who computes what, and when a sequence ends."""

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.pages import Reservation
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.sequence import Ending, Sequence

EOS = 2


def sequence(
    stream: int, prompt: int, computed: int = 0, *, priority: int = 0, deadline: float | None = None, **stop: Any
) -> Sequence:
    conditions = StopConditions(max_tokens=100, **stop)
    return Sequence(
        stream=stream,
        pages=cast(Reservation, None),
        prompt_tokens=prompt,
        tokens=list(range(10, 10 + prompt)),
        computed=computed,
        sampling=SamplingParams(),
        seed=0,
        stop=conditions,
        eos=frozenset({EOS}),
        max_tokens=5,
        vocab=1000,
        priority=priority,
        deadline=deadline,
    )


def finish(shares: list[Share]) -> None:
    """What the engine does after a step, with a token that ends nothing."""
    for share in shares:
        share.sequence.computed += share.count
        if share.samples:
            share.sequence.accept(99)


def test_everybody_with_one_pending_token_is_in_every_step() -> None:
    scheduler = Scheduler(step_tokens=32)
    running = [sequence(number, 33, 32) for number in range(30)]
    for each in running:
        scheduler.join(each)
    scheduler.join(sequence(100, 500))
    for _ in range(3):
        shares = scheduler.next_step()
        assert [share.sequence for share in shares[:30]] == running
        assert [share.count for share in shares] == [1] * 30 + [2]
        finish(shares)


def counts(shares: list[Share]) -> list[tuple[int, int, bool]]:
    return [(share.sequence.stream, share.count, share.samples) for share in shares]


def test_longer_work_shares_the_rest_equally() -> None:
    scheduler = Scheduler(step_tokens=64)
    for stream, prompt in enumerate((50, 30, 10)):
        scheduler.join(sequence(stream, prompt))
    first = scheduler.next_step()
    # 21 for each; what the last leaves goes to who joined first.
    assert counts(first) == [(0, 33, False), (1, 21, False), (2, 10, True)]
    finish(first)
    second = scheduler.next_step()
    assert counts(second) == [(2, 1, True), (0, 17, True), (1, 9, True)]


def test_the_end_of_a_prompt_does_not_wait_for_a_whole_one() -> None:
    scheduler = Scheduler(step_tokens=256)
    scheduler.join(sequence(1, 10_000))
    scheduler.join(sequence(2, 64, 32))
    assert counts(scheduler.next_step()) == [(1, 224, False), (2, 32, True)]


def test_higher_priority_computes_first_and_the_nearest_deadline_takes_what_is_left() -> None:
    scheduler = Scheduler(step_tokens=64)
    scheduler.join(sequence(1, 100))
    scheduler.join(sequence(2, 40, deadline=50.0))
    scheduler.join(sequence(3, 40, deadline=20.0))
    assert counts(scheduler.next_step()) == [(3, 22, False), (2, 21, False), (1, 21, False)]
    scheduler.join(sequence(4, 60, priority=1))
    assert counts(scheduler.next_step()) == [(4, 60, True), (3, 2, False), (2, 1, False), (1, 1, False)]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 400), st.integers(-1, 1), st.none() | st.floats(0, 9)), min_size=1, max_size=12),
)
def test_no_step_exceeds_its_budget_or_idles(budget: int, prompts: list[tuple[int, int, float | None]]) -> None:
    scheduler = Scheduler(step_tokens=max(budget, len(prompts)))
    for stream, (prompt, priority, deadline) in enumerate(prompts):
        scheduler.join(sequence(stream, prompt, priority=priority, deadline=deadline))
    shares = scheduler.next_step()
    wanted = sum(prompt for prompt, _, _ in prompts)
    assert sum(share.count for share in shares) == min(wanted, max(budget, len(prompts)))
    assert all(1 <= share.count <= share.sequence.pending for share in shares)
    assert len({share.sequence.stream for share in shares}) == len(shares)


def test_an_awaited_token_is_carried_and_none_is_drawn_beyond_the_length() -> None:
    scheduler = Scheduler(step_tokens=64)
    running = sequence(1, 4)
    scheduler.join(running)
    running.computed, running.awaited, running.row = 4, 1, 3
    (share,) = scheduler.next_step()
    assert (share.start, share.count, share.samples, share.carried, list(share.tokens)) == (4, 1, True, 3, [])
    running.tokens += [5, 6, 7, 8]
    running.computed = 8
    assert scheduler.next_step() == []


def test_who_has_left_is_in_no_step() -> None:
    scheduler = Scheduler(step_tokens=64)
    scheduler.join(sequence(1, 10))
    scheduler.leave(1)
    scheduler.leave(1)
    assert scheduler.next_step() == []
    assert len(scheduler) == 0


def test_length_ends_a_sequence_at_its_budget() -> None:
    running = sequence(1, 4)
    assert [running.accept(50) for _ in range(5)] == [None] * 4 + [Ending.LENGTH]
    assert running.output_tokens == 5
    assert running.stop_token is None


@pytest.mark.parametrize(("stop", "token"), [({}, EOS), ({"stop_token_ids": (77,)}, 77)])
def test_a_stop_token_ends_a_sequence_and_is_not_output(stop: dict[str, Any], token: int) -> None:
    running = sequence(1, 4, **stop)
    running.accept(50)
    assert running.accept(token) is Ending.STOP
    assert running.stop_token == token
    assert running.tokens[4:] == [50]


def test_ignored_end_of_sequence_is_output() -> None:
    running = sequence(1, 4, ignore_eos=True, stop_token_ids=(77,))
    assert running.accept(EOS) is None
    assert running.tokens[-1] == EOS
    assert running.accept(77) is Ending.STOP


def test_endings_are_banned_until_min_tokens() -> None:
    running = sequence(1, 4, min_tokens=2, stop_token_ids=(77, 5000))
    assert sorted(running.banned()) == [EOS, 77]
    running.accept(50)
    running.accept(51)
    assert list(running.banned()) == []


def test_output_of_an_earlier_attempt_counts() -> None:
    running = sequence(1, 4)
    running.tokens += [60, 61, 62, 63]
    assert running.draw_position == 4
    assert running.pending == 8
    assert running.accept(64) is Ending.LENGTH
