"""Scheduling and sequences: who computes what, and when a sequence ends."""

from typing import Any, cast

import pytest

from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.pages import Reservation
from hma_serve.decode.scheduler import Scheduler, Share
from hma_serve.decode.sequence import Ending, Sequence

EOS = 2


def sequence(stream: int, prompt: int, computed: int = 0, **stop: Any) -> Sequence:
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
    )


def finish(shares: list[Share]) -> None:
    """What the engine does after a step, with a token that ends nothing."""
    for share in shares:
        samples = share.samples
        share.sequence.computed += share.count
        if samples:
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


def test_longer_work_shares_the_rest_first_come_first_served() -> None:
    scheduler = Scheduler(step_tokens=64)
    for stream, prompt in enumerate((50, 30, 10)):
        scheduler.join(sequence(stream, prompt))
    first = scheduler.next_step()
    assert [(share.sequence.stream, share.count, share.samples) for share in first] == [(0, 50, True), (1, 14, False)]
    finish(first)
    second = scheduler.next_step()
    assert [(share.sequence.stream, share.count, share.samples) for share in second] == [
        (0, 1, True),
        (1, 16, True),
        (2, 10, True),
    ]


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
    assert sorted(running.draw().banned) == [EOS, 77]
    running.accept(50)
    running.accept(51)
    assert list(running.draw().banned) == []


def test_output_of_an_earlier_attempt_counts() -> None:
    running = sequence(1, 4)
    running.tokens += [60, 61, 62, 63]
    assert running.draw().position == 4
    assert running.pending == 8
    assert running.accept(64) is Ending.LENGTH
