"""A prefill engine without its front: a test submits jobs, takes layers out of slots and gives the slots back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.prefix import prefix_root
from hma_serve.internal.v1 import prefill_engine_pb2 as pb
from hma_serve.ipc import Arena
from hma_serve.prefill.accelerators import Accelerator
from hma_serve.prefill.engine import Engine, EngineOptions
from hma_serve.prefill.job import Job
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.prefix_cache import PrefixCache
from hma_serve.prefill.scheduler import Scheduler

Packed = NDArray[np.uint8]
Layers = dict[tuple[int, int, int], Packed]
"""Packed bytes by (layer, role, first token)."""


@dataclass
class EngineBench:
    """An engine with its arena, its cache and everything it emitted."""

    engine: Engine
    arena: Arena
    layout: KvLayout
    cache: PrefixCache
    events: list[pb.PrefillEngineEvent] = field(default_factory=list)

    def submit(
        self, job: int, token_ids: list[int], *, token_start: int = 0, due_ns: int = 1000, tenant: str = ""
    ) -> None:
        submit = pb.PrefillSubmit(job=job, token_ids=token_ids, token_start=token_start, due_ns=due_ns, tenant=tenant)
        self.engine.handle([pb.PrefillEngineCommand(submit=submit)])

    def sent(self, job: int) -> None:
        self.engine.handle([pb.PrefillEngineCommand(sent=pb.PrefillLayerSent(job=job))])

    def close(self, job: int) -> None:
        self.engine.handle([pb.PrefillEngineCommand(close=pb.PrefillClose(job=job))])

    def layers(self, job: int) -> list[pb.PrefillLayerDone]:
        return [event.layer for event in self.events if event.HasField("layer") and event.layer.job == job]

    def receive(self, done: pb.PrefillLayerDone) -> list[Packed]:
        """A copy of what is to be sent of a layer's slot, K then V."""
        memory = self.arena.slot(done.slot, self.layout.layer_bytes(done.chunk_tokens, done.head_count))
        first = (done.token_start - done.chunk_start) // GROUP_TOKENS
        sent = slice(first, first + done.token_count // GROUP_TOKENS)
        views = self.layout.views(memory, done.chunk_tokens, done.head_count)
        return [view[:, sent].copy() for view in views]

    def run_all(self, *jobs: int) -> dict[int, Layers]:
        """Runs the engine dry, returning slots at once; what each job would have sent."""
        received: dict[int, Layers] = {job: {} for job in jobs}
        seen = len(self.events)
        while self.engine.step():
            for event in self.events[seen:]:
                if event.HasField("layer") and event.layer.token_count:
                    done = event.layer
                    for role, packed in zip(ROLES, self.receive(done), strict=True):
                        received[done.job][done.layer, role, done.token_start] = packed
                    self.sent(done.job)
            seen = len(self.events)
        return received

    def run(self, job: int) -> Layers:
        """As `run_all`, of the only job."""
        return self.run_all(job)[job]


def make_engine_bench(
    accelerator: Accelerator,
    layout: KvLayout,
    *,
    chunk: int = 64,
    running: int = 2,
    ahead: int = 2,
    waiting: int = 4,
    cached_tokens: int = 0,
    overlap: bool = True,
) -> EngineBench:
    """The arena is the caller's to close."""
    arena = Arena.create(running * ahead, layout.layer_bytes(chunk))
    scheduler: Scheduler[Job] = Scheduler(max_running=running, max_waiting=waiting, capacity_tokens=4096)
    cache = PrefixCache(layout, layout.layers * layout.layer_bytes(cached_tokens))
    events: list[pb.PrefillEngineEvent] = []
    options = EngineOptions(
        chunk_tokens=chunk, layers_ahead=ahead, overlap=overlap, prefix_root=lambda tenant: prefix_root("test", tenant)
    )
    engine = Engine(
        accelerator=accelerator,
        layout=layout,
        arena=arena,
        scheduler=scheduler,
        cache=cache,
        options=options,
        emit=events.append,
    )
    return EngineBench(engine, arena, layout, cache, events)


def joined(received: Layers) -> dict[tuple[int, int], Packed]:
    """Chunks put together: packed bytes [heads, groups, group bytes] by (layer, role)."""
    keys = sorted({(layer, role) for layer, role, _ in received})
    starts = sorted({start for *_, start in received})
    return {
        key: np.concatenate([received[*key, start] for start in starts if (*key, start) in received], axis=1)
        for key in keys
    }
