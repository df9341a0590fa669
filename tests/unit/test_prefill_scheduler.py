"""Which job runs: earliest deadline first, priorities before that, within bounds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hma_serve.prefill.scheduler import Scheduler


@dataclass
class Job:
    job_id: int
    due_ns: int = 100
    priority: int = 0
    tokens: int = 32
    runnable: bool = True


def scheduler(*, running: int = 2, waiting: int = 2, capacity: int = 256) -> Scheduler[Job]:
    return Scheduler(max_running=running, max_waiting=waiting, capacity_tokens=capacity)


def started(schedule: Scheduler[Job]) -> list[int]:
    return [job.job_id for job in schedule.start()]


def test_the_earliest_deadline_runs_first_and_arrival_breaks_ties() -> None:
    schedule = scheduler(running=3)
    for job in (Job(1, due_ns=30), Job(2, due_ns=10), Job(3, due_ns=10)):
        schedule.submit(job)
    assert started(schedule) == [2, 3, 1]
    assert [job.job_id for job in schedule.ready()] == [2, 3, 1]


def test_priority_comes_before_the_deadline() -> None:
    schedule = scheduler()
    schedule.submit(Job(1, due_ns=1))
    schedule.submit(Job(2, due_ns=9, priority=1))
    assert started(schedule) == [2, 1]
    assert [job.job_id for job in schedule.ready()] == [2, 1]


def test_a_job_that_cannot_run_leaves_the_engine_to_others() -> None:
    schedule = scheduler()
    parked = Job(1, due_ns=1)
    schedule.submit(parked)
    schedule.submit(Job(2, due_ns=2))
    started(schedule)
    parked.runnable = False
    assert [job.job_id for job in schedule.ready()] == [2]
    schedule.remove(2)
    assert schedule.ready() == []
    parked.runnable = True
    assert schedule.ready() == [parked]


def test_running_jobs_are_bounded_and_a_removed_one_makes_room() -> None:
    schedule = scheduler(running=1)
    schedule.submit(Job(1))
    schedule.submit(Job(2))
    assert started(schedule) == [1]
    assert (schedule.running, schedule.waiting) == (1, 1)
    schedule.remove(1)
    assert started(schedule) == [2]


def test_a_long_prompt_is_not_overtaken_by_shorter_ones_that_would_fit() -> None:
    schedule = scheduler(running=4, waiting=4, capacity=256)
    schedule.submit(Job(1, tokens=192))
    assert started(schedule) == [1]
    schedule.submit(Job(2, tokens=128, due_ns=50))
    schedule.submit(Job(3, tokens=32, due_ns=60))
    assert started(schedule) == []
    assert schedule.held_tokens == 192
    schedule.remove(1)
    assert started(schedule) == [2, 3]


def test_what_does_not_fit_cannot_be_submitted() -> None:
    schedule = scheduler(running=1, waiting=1, capacity=64)
    assert not schedule.can_submit(96)
    with pytest.raises(ValueError, match="cannot be queued"):
        schedule.submit(Job(1, tokens=96))
    schedule.submit(Job(1))
    with pytest.raises(ValueError, match="cannot be queued"):
        schedule.submit(Job(1))
    schedule.submit(Job(2))
    assert not schedule.can_submit(32)
    schedule.remove(2)
    assert schedule.can_submit(32)


def test_jobs_are_found_until_they_are_removed() -> None:
    schedule = scheduler()
    job = Job(1)
    schedule.submit(job)
    assert schedule.find(1) is job
    started(schedule)
    assert schedule.find(1) is job
    assert schedule.remove(1) is job
    assert schedule.find(1) is None
    assert schedule.remove(1) is None
