"""Which request's next layer runs: earliest deadline first, over few running requests and a bounded queue.

The unit is one layer of one chunk, so an urgent prompt overtakes a long one within a layer, a cancelled one stops
within a layer, and one whose receiver is slow (it may not run until its slots are free) leaves the engine to the
others. Due times are absolute, so waiting makes a request more urgent by itself and none starves. Who is computed
beside the most urgent one, `hma_serve.prefill.batching` says.

Pure bookkeeping: no clock, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a job."""

    @property
    def job_id(self) -> int:
        """Unique; rises with arrival."""
        ...

    @property
    def priority(self) -> int:
        """Higher runs earlier."""
        ...

    @property
    def due_ns(self) -> int:
        """Absolute: when its first token is due."""
        ...

    @property
    def tokens(self) -> int:
        """What its KV takes of the capacity while it runs."""
        ...

    @property
    def runnable(self) -> bool:
        """Whether its next layer could run now."""
        ...


Job = TypeVar("Job", bound=Schedulable)


def urgency(job: Schedulable) -> tuple[int, int, int]:
    """Sort key: priority, then due time, then arrival."""
    return (-job.priority, job.due_ns, job.job_id)


class Scheduler(Generic[Job]):
    """Holds every job from `submit` to `remove`.

    A job waits, then runs until it is removed. Running jobs never exceed `max_running` jobs nor `capacity_tokens`
    tokens. The most urgent waiting job is never overtaken by a smaller one that would fit, so long prompts start too.

    Args:
        max_running: Jobs whose KV may be held at once.
        max_waiting: Jobs that may wait.
        capacity_tokens: Tokens whose KV may be held at once.
    """

    def __init__(self, *, max_running: int, max_waiting: int, capacity_tokens: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._capacity_tokens = capacity_tokens
        self._waiting: dict[int, Job] = {}
        self._running: dict[int, Job] = {}

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that started and were not removed."""
        return len(self._running)

    @property
    def held_tokens(self) -> int:
        """Tokens of the running jobs."""
        return sum(job.tokens for job in self._running.values())

    def can_submit(self, tokens: int) -> bool:
        """Whether a job of that size may be submitted now; False also for one that could never run."""
        full = len(self._waiting) + len(self._running) >= self._max_waiting + self._max_running
        return not full and tokens <= self._capacity_tokens

    def submit(self, job: Job) -> None:
        """Queues a job for which `can_submit` holds.

        Raises:
            ValueError: It does not hold, or the id is in use.
        """
        if not self.can_submit(job.tokens) or job.job_id in self._waiting or job.job_id in self._running:
            raise ValueError(f"job {job.job_id} with {job.tokens} tokens cannot be queued")
        self._waiting[job.job_id] = job

    def find(self, job_id: int) -> Job | None:
        """The job, if it was submitted and not removed."""
        return self._running.get(job_id) or self._waiting.get(job_id)

    def remove(self, job_id: int) -> Job | None:
        """Forgets a job, whether it waits or runs."""
        return self._running.pop(job_id, None) or self._waiting.pop(job_id, None)

    def start(self) -> Iterator[Job]:
        """Starts waiting jobs, most urgent first, while they fit; yields each one started."""
        for job in sorted(self._waiting.values(), key=urgency):
            if len(self._running) >= self._max_running or self.held_tokens + job.tokens > self._capacity_tokens:
                return
            self._running[job.job_id] = self._waiting.pop(job.job_id)
            yield job

    def ready(self) -> list[Job]:
        """The jobs that can run a layer now, most urgent first."""
        return sorted((job for job in self._running.values() if job.runnable), key=urgency)
