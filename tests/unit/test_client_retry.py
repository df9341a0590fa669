"""When a request is tried again, where and after how long: no I/O, no clock."""

import pytest

from hma_serve.client import (
    DeadlineExceeded,
    HmaError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)
from hma_serve.client._retry import Attempts, Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def attempts(
    addresses: int = 1,
    *,
    first: int = 0,
    policy: RetryPolicy | None = None,
    deadline: Deadline | None = None,
    random: float = 0.0,
) -> Attempts:
    return Attempts(policy or RetryPolicy(), addresses, first, deadline or Deadline(None), lambda: random)


def test_an_unreachable_router_is_followed_by_the_next_at_once() -> None:
    course = attempts(3, first=1)
    assert course.address == 1
    assert course.after(Unavailable("down")) == 0.0
    assert course.address == 2
    assert course.after(Unavailable("down")) == 0.0
    assert course.address == 0


def test_a_round_without_success_is_followed_by_a_growing_pause() -> None:
    course = attempts(2, policy=RetryPolicy(rounds=4, initial_backoff=1.0, max_backoff=3.0), random=0.999999)
    waits = []
    while (wait := course.after(Unavailable("down"))) is not None:
        waits.append(wait)
    assert waits == [0.0, pytest.approx(1.0), 0.0, pytest.approx(2.0), 0.0, pytest.approx(3.0), 0.0]


def test_pauses_are_jittered_by_half() -> None:
    policy = RetryPolicy(initial_backoff=1.0)
    assert attempts(policy=policy, random=0.0).after(Unavailable("down")) == 0.5
    assert attempts(policy=policy, random=0.5).after(Unavailable("down")) == 0.75


def test_a_full_server_gets_the_time_it_asked_for_whoever_is_next() -> None:
    course = attempts(3)
    wait = course.after(ResourceExhausted("full", retry_after=1.5))
    assert wait == 1.5
    assert course.address == 1
    assert attempts(random=1.0).after(ResourceExhausted("full", retry_after=2.0)) == 2.5


def test_a_server_may_not_ask_for_any_time_it_likes() -> None:
    assert attempts().after(ResourceExhausted("full", retry_after=11.0)) is None
    assert attempts(policy=RetryPolicy(max_retry_after=20)).after(ResourceExhausted("full", retry_after=11.0)) == 11.0


@pytest.mark.parametrize(
    "error",
    [InvalidArgument("no"), Internal("bug"), DeadlineExceeded("late"), ResourceExhausted("message too large")],
    ids=lambda error: error.code,
)
def test_other_failures_are_final(error: HmaError) -> None:
    assert attempts(3).after(error) is None


def test_rounds_are_bounded() -> None:
    assert attempts(policy=RetryPolicy(rounds=1)).after(Unavailable("down")) is None
    course = attempts(2, policy=RetryPolicy(rounds=1))
    assert course.after(Unavailable("down")) == 0.0
    assert course.after(Unavailable("down")) is None


def test_a_pause_that_would_outlast_the_deadline_is_not_begun() -> None:
    clock = Clock()
    course = attempts(deadline=Deadline(10.0, clock))
    clock.now += 8.6
    assert course.after(ResourceExhausted("full", retry_after=1.3)) == 1.3
    assert course.after(ResourceExhausted("full", retry_after=1.5)) is None


def test_a_deadline_counts_down_to_zero() -> None:
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.now += 0.5
    assert deadline.remaining() == 1.5
    clock.now += 5.0
    assert deadline.remaining() == 0.0
    assert Deadline(None, clock).remaining() is None


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_positive(timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        Deadline(timeout)


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"initial_backoff": -1}, {"max_backoff": -1}, {"max_retry_after": -1}]
)
def test_an_impossible_policy_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match="retry"):
        RetryPolicy(**wrong)
