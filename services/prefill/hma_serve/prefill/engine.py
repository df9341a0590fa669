"""The compute loop of a prefill instance: one layer of one chunk at a time, each handed to the front when it is done.

Ownership of a slot: a layer is computed only when a slot of its job's share is free; the front holds the slot from
`PrefillLayerDone` to `PrefillLayerSent` (or `PrefillClose`). A job may have `layers_ahead` layers handed out and not
yet sent; then it is parked and others run. So with the usual two, a layer has left before the one after the next is
computed, a stalled receiver costs its own request alone, and slots can never run out: there are `layers_ahead` for
each job that may run.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import HmaError, Internal
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.prefill.accelerators import Accelerator, KvStore, Segment
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.scheduler import Scheduler

_log = logging.getLogger(__name__)

Emit = Callable[[pb.PrefillEngineEvent], None]


@dataclass
class Job:
    """One request inside the engine.

    Attributes:
        job_id: The front's name for it.
        token_ids: What to compute; whole groups.
        token_start: KV of tokens before it is not handed out.
        deadline_ns: Absolute, CLOCK_MONOTONIC.
        priority: Higher runs earlier.
        layers_ahead: Layers that may be handed out and not yet sent.
        slots: Of layers handed out and not yet sent, oldest first.
        store: The packed KV, from start to close.
        hidden: The current chunk's residual stream; None between chunks.
        chunk_start: First token of the current chunk.
        layer: The layer that comes next.
        failed: Computation ended with an error; only the close is still to come.
    """

    job_id: int
    token_ids: list[int]
    token_start: int
    deadline_ns: int
    priority: int
    layers_ahead: int
    slots: deque[int] = field(default_factory=deque)
    store: KvStore | None = None
    hidden: torch.Tensor | None = None
    chunk_start: int = 0
    layer: int = 0
    failed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return len(self.token_ids)

    @property
    def runnable(self) -> bool:
        """Whether work is left and a slot of its share is free."""
        return not self.failed and self.chunk_start < self.tokens and len(self.slots) < self.layers_ahead


class Engine:
    """Computes submitted jobs; `handle` commands, then `step` while it says that there is more.

    Args:
        accelerator: Holds the weights.
        layout: Of the packed KV.
        arena: At least `layers_ahead` slots for each job that may run, each for one layer of one chunk.
        scheduler: Decides the order.
        chunk_tokens: Tokens computed together; a multiple of 32.
        layers_ahead: See above.
        emit: Takes each event for the front.
        clock_ns: Monotonic time.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        layout: KvLayout,
        arena: Arena,
        scheduler: Scheduler[Job],
        chunk_tokens: int,
        layers_ahead: int,
        emit: Emit,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._accelerator = accelerator
        self._layout = layout
        self._arena = arena
        self._scheduler = scheduler
        self._chunk_tokens = chunk_tokens
        self._layers_ahead = layers_ahead
        self._emit = emit
        self._clock_ns = clock_ns
        self._free = deque(range(arena.slots))

    @property
    def idle(self) -> bool:
        """Whether no job is known; then every slot is free."""
        return not self._scheduler.waiting and not self._scheduler.running

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def handle(self, commands: Iterable[pb.PrefillEngineCommand]) -> None:
        """Applies the front's commands in order."""
        for command in commands:
            match command.WhichOneof("command"):
                case "submit":
                    self._submit(command.submit)
                case "sent":
                    self._layer_sent(command.sent.job)
                case "close":
                    self._close(command.close.job)

    def step(self) -> bool:
        """Starts what can start and computes one layer; False when nothing can run until a command comes."""
        for job in self._scheduler.start():
            self._start(job)
        next_job = self._scheduler.next()
        if next_job is None:
            return False
        try:
            self._run_layer(next_job)
        except Exception as exc:
            self._fail(next_job, exc)
        return True

    def _submit(self, command: pb.PrefillSubmit) -> None:
        self._scheduler.submit(
            Job(
                job_id=command.job,
                token_ids=list(command.token_ids),
                token_start=command.token_start,
                deadline_ns=command.deadline_ns,
                priority=command.priority,
                layers_ahead=self._layers_ahead,
            )
        )

    def _start(self, job: Job) -> None:
        self._emit(pb.PrefillEngineEvent(started=pb.PrefillStarted(job=job.job_id, at_ns=self._clock_ns())))

    def _layer_sent(self, job_id: int) -> None:
        job = self._scheduler.find(job_id)
        if job is None or not job.slots:
            raise Internal(f"the front reports a sent layer of job {job_id}, which has none out")
        self._free.append(job.slots.popleft())

    def _close(self, job_id: int) -> None:
        job = self._scheduler.remove(job_id)
        if job is None:
            raise Internal(f"the front closes job {job_id}, which is not open")
        self._free.extend(job.slots)

    def _run_layer(self, job: Job) -> None:
        store, hidden, tokens = self._begin(job)
        layer, chunk_start = job.layer, job.chunk_start
        started = self._clock_ns()
        hidden = self._accelerator.run_layer(layer, hidden, [Segment(chunk_start, tokens, store)])
        slot = self._free.popleft()
        job.slots.append(slot)
        # Tokens that decode already holds were needed for attention, but do not travel.
        send_start = min(max(chunk_start, job.token_start), chunk_start + tokens)
        send_tokens = chunk_start + tokens - send_start
        self._pack(store, layer, send_start, send_tokens, slot)
        self._advance(job, hidden, tokens)
        done = pb.PrefillLayerDone(
            job=job.job_id,
            layer=layer,
            token_start=send_start,
            token_count=send_tokens,
            head_start=0,
            head_count=self._layout.heads,
            slot=slot,
            chunk_start=chunk_start,
            chunk_tokens=tokens,
            started_ns=started,
            finished_ns=self._clock_ns(),
        )
        self._emit(pb.PrefillEngineEvent(layer=done))

    def _begin(self, job: Job) -> tuple[KvStore, torch.Tensor, int]:
        """The job's KV, residual stream and tokens of the current chunk, made if it is at their beginning."""
        if job.store is None:
            job.store = self._accelerator.new_store(job.tokens)
        tokens = min(self._chunk_tokens, job.tokens - job.chunk_start)
        if job.hidden is None:
            job.hidden = self._accelerator.embed(job.token_ids[job.chunk_start : job.chunk_start + tokens])
        return job.store, job.hidden, tokens

    def _pack(self, store: KvStore, layer: int, start: int, tokens: int, slot: int) -> None:
        """Copies a layer's native bytes into a slot."""
        memory = self._arena.slot(slot, self._layout.layer_bytes(tokens))
        groups = slice(start // GROUP_TOKENS, (start + tokens) // GROUP_TOKENS)
        views = self._layout.views(memory, tokens, self._layout.heads)
        for role, view in zip(ROLES, views, strict=True):
            copy = store.copy_out(layer, role, slice(0, self._layout.heads), groups, view)
            if copy is not None:
                copy.wait()

    def _advance(self, job: Job, hidden: torch.Tensor, tokens: int) -> None:
        job.layer += 1
        job.hidden = hidden
        if job.layer == self._layout.layers:
            job.layer, job.hidden = 0, None
            job.chunk_start += tokens

    def _fail(self, job: Job, exc: Exception) -> None:
        """Ends one job; its slots stay out until the front closes it."""
        if not isinstance(exc, HmaError):
            _log.error("computing job %d failed", job.job_id, exc_info=exc)
            exc = Internal("the computation failed; the log of the prefill engine says more")
        job.failed, job.hidden, job.store = True, None, None
        self._emit(pb.PrefillEngineEvent(failed=pb.PrefillFailed(job=job.job_id, error=error_detail(exc))))
