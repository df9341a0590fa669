"""The compute loop of a prefill instance: one layer of some chunks at a time, each handed to the front when it is done.

Ownership of a slot: a layer is computed only when a slot of its job's share is free; the front holds the slot from
`PrefillLayerDone` to `PrefillLayerSent` (or `PrefillClose`). A job may have `layers_ahead` layers handed out and not
yet sent; then it is parked and others run, also those it was computed together with. So with the usual two, a layer has
left before the one after the next is computed, a stalled receiver costs its own request alone, and slots can never run
out: there are `layers_ahead` for each job that may run.

A device may work behind our back: what it was given is in `_handed` until it is done, in order, and few at a time, so
that an urgent or cancelled request never waits for a long queue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve.core.error_detail import error_detail
from hma_serve.core.errors import HmaError, Internal
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.prefix import prefix_names
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.prefill import batching
from hma_serve.prefill.accelerators import Accelerator, Completion, Segment
from hma_serve.prefill.job import Chunk, Job, Source
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.prefix_cache import PrefixCache
from hma_serve.prefill.scheduler import Scheduler

_log = logging.getLogger(__name__)

Emit = Callable[[pb.PrefillEngineEvent], None]

_SMOOTHING = 0.2
# Layers that a device may have been given and not done: one to compute, one behind it.
_QUEUED_LAYERS = 2


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine works.

    Attributes:
        chunk_tokens: Tokens computed together at most; a multiple of 32.
        layers_ahead: Layers of a job that may be handed out and not yet sent.
        overlap: Hand out each layer as soon as it is there; otherwise all of them after the last.
        prefix_root: Gives a tenant's root of prefix names.
    """

    chunk_tokens: int
    layers_ahead: int
    overlap: bool
    prefix_root: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One job's part of a layer that is on its way out of the device.

    Attributes:
        job: Whose.
        chunk: Which tokens.
        layer: Which layer.
        share: The part of the batch's tokens that is its own.
        slot: Where the front will find it; None: nowhere.
        views: Where it goes, per role; empty: nowhere.
        reported: The front is told.
    """

    job: Job
    chunk: Chunk
    layer: int
    share: float
    slot: int | None
    views: Sequence[NDArray[np.uint8]]
    reported: bool


@dataclass(slots=True)
class _Handed:
    """A layer of a batch that the device was given.

    Attributes:
        pieces: By job.
        started_ns: When it was given.
        computed_ns: When it was computed, if that is known.
        completions: What must be done before the pieces are there.
    """

    pieces: list[_Piece]
    started_ns: int
    computed_ns: int | None
    completions: list[Completion]

    def done(self) -> bool:
        return all(completion.done() for completion in self.completions)

    def wait(self) -> None:
        for completion in self.completions:
            completion.wait()


class Engine:
    """Computes submitted jobs; `handle` commands, then `step` while it says that there is more.

    Args:
        accelerator: Holds the weights.
        layout: Of the packed KV.
        arena: At least `layers_ahead` slots for each job that may run, each for one layer of one chunk.
        scheduler: Decides the order.
        cache: Of prefixes.
        options: See there.
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
        cache: PrefixCache,
        options: EngineOptions,
        emit: Emit,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._accelerator = accelerator
        self._layout = layout
        self._arena = arena
        self._scheduler = scheduler
        self._cache = cache
        self._options = options
        self._emit = emit
        self._clock_ns = clock_ns
        self._free = deque(range(arena.slots))
        self._handed: deque[_Handed] = deque()
        self._last_computed_ns = 0
        self._token_ns = 0.0

    @property
    def idle(self) -> bool:
        """Whether no job is known; then every slot is free and every page of the cache accounted for."""
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
        """Starts what can start and does one layer; False when nothing can be done until a command comes."""
        self._report(wait_above=_QUEUED_LAYERS - 1)
        for job in self._scheduler.start():
            self._start(job)
        ready = self._scheduler.ready()
        if not ready:
            return self._report(wait_above=0)
        batch = self._batch(ready)
        try:
            self._run_layer(batch)
        except Exception as exc:
            self._run_apart(batch, exc)
        self._report(wait_above=_QUEUED_LAYERS)
        return True

    # Commands.

    def _submit(self, command: pb.PrefillSubmit) -> None:
        token_ids = list(command.token_ids)
        root = self._options.prefix_root(command.tenant)
        self._scheduler.submit(
            Job(
                job_id=command.job,
                token_ids=token_ids,
                token_start=command.token_start,
                due_ns=command.due_ns,
                priority=command.priority,
                layers_ahead=self._options.layers_ahead,
                names=prefix_names(root, token_ids) if self._cache.capacity else [],
                lease=self._cache.lease(),
                overlap=self._options.overlap,
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
        self._abandon(job)
        self._free.extend(job.slots)
        if self.idle:
            self._cache.check_integrity()

    def _abandon(self, job: Job) -> None:
        """Frees what the job's computation holds, once the device writes to none of it any more."""
        chunks = set() if job.chunk is None else {job.chunk}
        for handed in self._handed:
            own = [piece for piece in handed.pieces if piece.job is job]
            if own:
                handed.wait()
                handed.pieces = [piece for piece in handed.pieces if piece.job is not job]
                chunks |= {piece.chunk for piece in own}
        for chunk in chunks:
            if chunk.source is not Source.CACHED:
                self._cache.give_back(chunk.pages)
        self._cache.release(job.lease)
        job.drop()

    # Which tokens are next.

    def _batch(self, ready: list[Job]) -> list[Job]:
        """The most urgent job and those that are computed beside it; each has a chunk at the same layer."""
        lead, others = ready[0], ready[1:]
        if lead.chunk is None:
            self._open_together(lead, [job for job in others if job.chunk is None and job.remaining])
        chunk = lead.chunk
        assert chunk is not None
        batch, room = [lead], self._options.chunk_tokens - chunk.tokens
        for job in others:
            if chunk.in_step(job.chunk) and job.chunk.tokens <= room:
                batch.append(job)
                room -= job.chunk.tokens
        return batch

    def _open_together(self, lead: Job, others: Sequence[Job]) -> None:
        """Begins the lead's next chunk, and chunks of those that find room beside it."""
        most, now = self._options.chunk_tokens, self._clock_ns()
        urgent = [job for job in others if batching.urgent_behind(lead, job, now_ns=now, token_ns=self._token_ns)]
        spare = batching.spare_tokens(lead, most=most, now_ns=now, token_ns=self._token_ns)
        room = most - self._open(lead, batching.lead_tokens(lead, urgent, most=most))
        for job in others:
            allowed = batching.whole_groups(room if job in urgent else min(room, spare))
            if allowed:
                opened = self._open(job, allowed)
                room -= opened
                spare -= opened

    def _open(self, job: Job, most: int) -> int:
        """Begins a job's next chunk of at most so many computed tokens; returns how many of them there are."""
        if len(job.lease) * GROUP_TOKENS == job.position:
            self._cache.extend(job.lease, job.names)
        cached = len(job.lease) * GROUP_TOKENS - job.position
        if cached > 0:
            job.chunk = Chunk(job.position, min(cached, self._options.chunk_tokens), Source.CACHED)
            job.chunk.pages = job.lease.pages(job.chunk.groups)
            return 0
        source, most = (Source.COMPUTED, most) if job.computing else (Source.STORED, self._options.chunk_tokens)
        chunk = job.chunk = Chunk(job.position, min(job.tokens - job.position, most), source)
        if job.handing_out and job.names and max(job.kept, len(job.lease) * GROUP_TOKENS) == chunk.start:
            chunk.pages = self._cache.reserve(chunk.tokens // GROUP_TOKENS)
            job.kept = chunk.start + len(chunk.pages) * GROUP_TOKENS
        if source is Source.STORED:
            return 0
        chunk.hidden = self._accelerator.embed(job.token_ids[chunk.start : chunk.end])
        job.store = job.store or self._accelerator.new_store(job.tokens)
        return chunk.tokens

    # One layer.

    def _run_layer(self, batch: Sequence[Job]) -> None:
        chunks = [job.chunk for job in batch if job.chunk is not None]
        started, computed = self._clock_ns(), None
        fence: Completion | None = None
        if chunks[0].source is Source.COMPUTED:
            self._compute(batch, chunks)
            fence = self._accelerator.fence()
            computed = self._clock_ns() if fence is None else None
        completions = [] if fence is None else [fence]
        total = sum(chunk.tokens for chunk in chunks)
        pieces = []
        for job, chunk in zip(batch, chunks, strict=True):
            slot = self._take_slot(job, chunk)
            views, copies = self._move(job, chunk, slot)
            # Of a chunk that is not sent the front wants to know when it is done.
            reported = slot is not None or (job.handing_out and chunk.layer == self._layout.layers - 1)
            pieces.append(_Piece(job, chunk, chunk.layer, chunk.tokens / total, slot, views, reported))
            completions += copies
            self._advance(job, chunk)
        self._handed.append(_Handed(pieces, started, computed, completions))

    def _run_apart(self, batch: Sequence[Job], exc: Exception) -> None:
        """After a failure: each job alone, so that only those end whose own computation fails."""
        if len(batch) == 1:
            self._fail(batch[0], exc)
            return
        for job in batch:
            try:
                self._run_layer([job])
            except Exception as own:
                self._fail(job, own)

    def _compute(self, batch: Sequence[Job], chunks: Sequence[Chunk]) -> None:
        segments, rows = [], []
        for job, chunk in zip(batch, chunks, strict=True):
            assert job.store is not None
            assert chunk.hidden is not None
            segments.append(Segment(chunk.start, chunk.tokens, job.store))
            rows.append(chunk.hidden)
        hidden = rows[0] if len(rows) == 1 else torch.cat(rows)
        hidden = self._accelerator.run_layer(chunks[0].layer, hidden, segments)
        for chunk, part in zip(chunks, torch.split(hidden, [chunk.tokens for chunk in chunks]), strict=True):
            chunk.hidden = part

    def _take_slot(self, job: Job, chunk: Chunk) -> int | None:
        """A slot of the job's share, if the front is to send any of the chunk."""
        if not job.handing_out or chunk.end <= job.token_start:
            return None
        slot = self._free.popleft()
        job.slots.append(slot)
        return slot

    def _move(self, job: Job, chunk: Chunk, slot: int | None) -> tuple[Sequence[NDArray[np.uint8]], list[Completion]]:
        """Begins to copy the chunk's current layer to where it is wanted; returns where, and what is under way."""
        heads = slice(0, self._layout.heads)
        if chunk.source is Source.CACHED:
            # Later tokens attend to it, if any of the prompt is still to be computed.
            attended = len(job.lease) * GROUP_TOKENS < job.tokens and job.computing
            if slot is None and not attended:
                return (), []
            views = self._views(slot, chunk.tokens)
            self._cache.load(chunk.pages, chunk.layer, views)
            if attended:
                store = job.store = job.store or self._accelerator.new_store(job.tokens)
                for role, view in zip(ROLES, views, strict=True):
                    store.copy_in(chunk.layer, role, heads, chunk.groups, view)
            return views, []
        if slot is None and not chunk.pages:
            return (), []
        assert job.store is not None
        views, copies = self._views(slot, chunk.tokens), []
        for role, view in zip(ROLES, views, strict=True):
            copies.append(job.store.copy_out(chunk.layer, role, heads, chunk.groups, view))
        return views, [copy for copy in copies if copy is not None]

    def _views(self, slot: int | None, tokens: int) -> Sequence[NDArray[np.uint8]]:
        """Room for one layer: a slot, or memory of its own."""
        size = self._layout.layer_bytes(tokens)
        memory = memoryview(bytearray(size)) if slot is None else self._arena.slot(slot, size)
        return self._layout.views(memory, tokens, self._layout.heads)

    def _advance(self, job: Job, chunk: Chunk) -> None:
        chunk.layer += 1
        if chunk.layer == self._layout.layers:
            chunk.hidden = None
            job.end_chunk()

    # What is done.

    def _report(self, *, wait_above: int) -> bool:
        """Reports what the device has done, in order, and waits while more than so many layers are under way."""
        reported = False
        while self._handed and (self._handed[0].done() or len(self._handed) > wait_above):
            handed = self._handed[0]
            handed.wait()
            self._handed.popleft()
            now = self._clock_ns()
            self._measure(handed, now)
            for piece in handed.pieces:
                self._done(piece, handed.started_ns, handed.computed_ns or now)
            reported = True
        return reported

    def _measure(self, handed: _Handed, now: int) -> None:
        """Counts the device's time; what was queued behind another layer began when that one ended."""
        pieces = [piece for piece in handed.pieces if piece.chunk.source is Source.COMPUTED]
        if not pieces:
            return
        computed = handed.computed_ns or now
        spent = computed - max(handed.started_ns, self._last_computed_ns)
        self._last_computed_ns = computed
        for piece in pieces:
            piece.job.compute_ns += int(spent * piece.share)
            piece.job.computed_ns = computed
        token_ns = spent * pieces[0].share / pieces[0].chunk.tokens * self._layout.layers
        self._token_ns += (token_ns - self._token_ns) * (_SMOOTHING if self._token_ns else 1.0)

    def _done(self, piece: _Piece, started_ns: int, finished_ns: int) -> None:
        job, chunk = piece.job, piece.chunk
        if chunk.pages and chunk.source is not Source.CACHED:
            self._keep(piece)
        if not piece.reported:
            return
        # Tokens that decode already holds were needed for attention, but do not travel.
        send_start = min(max(chunk.start, job.token_start), chunk.end)
        done = pb.PrefillLayerDone(
            job=job.job_id,
            layer=piece.layer,
            token_start=send_start,
            token_count=chunk.end - send_start,
            head_start=0,
            head_count=self._layout.heads,
            slot=piece.slot or 0,
            chunk_start=chunk.start,
            chunk_tokens=chunk.tokens,
            started_ns=started_ns,
            finished_ns=finished_ns,
            compute_ns=job.compute_ns,
            computed_ns=job.computed_ns,
            cached=chunk.source is Source.CACHED,
        )
        job.compute_ns = 0
        self._emit(pb.PrefillEngineEvent(layer=done))

    def _keep(self, piece: _Piece) -> None:
        """Copies a layer into the cache's pages; after the last one they can be found."""
        job, chunk = piece.job, piece.chunk
        count = len(chunk.pages)
        self._cache.store(chunk.pages, piece.layer, [view[:, :count] for view in piece.views])
        if piece.layer == self._layout.layers - 1:
            self._cache.add(job.lease, job.names, chunk.pages)
            chunk.pages = []

    def _fail(self, job: Job, exc: Exception) -> None:
        """Ends one job; its slots stay out until the front closes it."""
        if not isinstance(exc, HmaError):
            _log.error("computing job %d failed", job.job_id, exc_info=exc)
            exc = Internal("the computation failed; the log of the prefill engine says more")
        self._abandon(job)
        job.failed = True
        self._emit(pb.PrefillEngineEvent(failed=pb.PrefillFailed(job=job.job_id, error=error_detail(exc))))
