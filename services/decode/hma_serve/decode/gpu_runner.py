"""`StepRunner` for CUDA devices: a step is one copy to the device and one replay of a captured graph.

A graph is captured per bucket of rows and per mixture of page kinds, when it is first needed; lengths, tables and
tokens lie in device memory, so it serves any. Every query token is a row of its own with its own length. A prompt's
last tokens see one another through the pages that the step has just written; a step that has such an *extend* reads
their pages for several of them at once, in a launch of its own beside the one for single tokens.

The host writes what a step needs into pinned memory, enqueues, and goes on. What was drawn comes back the same way, so
`drawn` waits for its own step and not for the one that began after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from hma_serve.core.errors import InvalidArgument
from hma_serve.decode.kernels.attention_call import (
    AttentionShape,
    AttentionWork,
    LayerPages,
    PartMemory,
    StepRows,
    pages_of,
    queries_at_once,
    together,
    warps_at_once,
)
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, PackedKind
from hma_serve.decode.kernels.page_orders import packed_kind
from hma_serve.decode.kernels.step_model import StepMemory, StepModel
from hma_serve.decode.pages import PagePool, Reservation
from hma_serve.decode.runner import DrawnTokens, Step, to_host
from hma_serve.decode.sampler import Drawn, Inputs, Occurrences, Rows, sample
from hma_serve.decode.scheduler import Share

_LEAST_PAGES = 1
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)
# Steps under way at most: two, and the one being written.
_STAGES = 3
_FIELDS = 7

_Kinds = tuple[PackedKind, PackedKind]


@dataclass(slots=True)
class _Graph:
    """A captured step.

    Attributes:
        graph: Replays it.
        logits: [bucket, vocab], its result.
        greedy: int64 [bucket], the likeliest tokens.
        works: Whose memory it writes to, which must live as long as it does.
    """

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    greedy: torch.Tensor
    works: Sequence[AttentionWork]


class GpuStepRunner:
    """See the module.

    Args:
        model: On the device.
        pool: Pages in fragment order (`kernels.page_orders.fragment_page`), bfloat16, on the same device.
        step_tokens: Rows of a step at most.
        sequences: Sequences that run at once at most.
        max_tokens: Tokens of a sequence at most.
        kinds: What packed pages are expected to hold, the most usual first; rows without any go with that.
        arrivals: Where KV is brought into pages; a sequence's first step waits for it. None: it is there.
    """

    def __init__(
        self,
        model: StepModel,
        pool: PagePool,
        *,
        step_tokens: int,
        sequences: int,
        max_tokens: int,
        kinds: Sequence[PackedKind] = (BLOCK_FLOAT,),
        arrivals: torch.cuda.Stream | None = None,
    ) -> None:
        if step_tokens > _BUCKETS[-1]:
            raise InvalidArgument(f"a step of {step_tokens} tokens is more than {_BUCKETS[-1]}", field="--step-tokens")
        self._model = model
        self._pool = pool
        self._expected = kinds
        device = model.device
        self._rows = next(bucket for bucket in _BUCKETS if bucket >= step_tokens)
        self._inputs = torch.zeros((_FIELDS, self._rows), dtype=torch.int32, device=device)
        self._chosen = torch.zeros(self._rows, dtype=torch.int64, device=device)
        self._last = torch.zeros(self._rows, dtype=torch.int64, device=device)
        self._stages = [torch.zeros((_FIELDS, self._rows), dtype=torch.int32).pin_memory() for _ in range(_STAGES)]
        self._stage = 0
        self._slots = _Slots(2 * sequences, pages_of(max_tokens), device, arrivals)
        self._memory = pool.memory.view(torch.int32)
        self._graphs: dict[tuple[int, tuple[_Kinds, ...], bool], _Graph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle()
        config = model.config
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._queries = queries_at_once(config.group_size)
        # Of single tokens, and of several that are read together: how many programs, and what these leave.
        self._programs: dict[int, int] = {}
        self._parts: dict[int, PartMemory] = {}
        for queries in (1, self._queries):
            programs = processors * warps_at_once(config.group_size, queries)
            self._programs[queries] = programs
            self._parts[queries] = PartMemory(programs, queries * config.group_size, config.head_dim, device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles the readers of the expected kinds, and captures every size of step for the first of them.

        What is left is captured when it is first needed, which then takes a fraction of a second.
        """
        for kind in self._expected:
            for bucket in _BUCKETS if kind is self._expected[0] else _BUCKETS[:2]:
                if bucket <= self._rows:
                    self._graph(bucket, ((kind, kind),), extends=False)
                    if bucket > 1:
                        self._graph(bucket, ((kind, kind),), extends=True)

    @torch.inference_mode()
    def begin(self, shares: Sequence[Share]) -> Step:
        """See `StepRunner`."""
        kinds = self._kinds(shares)
        count = sum(share.count for share in shares)
        bucket = next(bucket for bucket in _BUCKETS if bucket >= count)
        graph = self._graph(bucket, kinds, extends=any(share.count > 1 for share in shares))
        self._inputs.copy_(self._written(shares, kinds, bucket), non_blocking=True)
        graph.graph.replay()
        sampling = sum(share.samples for share in shares)
        return _GpuStep(graph.logits[:sampling], graph.greedy[:sampling], self._last)

    def _written(self, shares: Sequence[Share], kinds: tuple[_Kinds, ...], bucket: int) -> torch.Tensor:
        """A step's rows in pinned memory: token, slot, packed, length, kind, more, and the rows that are sampled."""
        self._stage = (self._stage + 1) % _STAGES
        stage = self._stages[self._stage]
        stage[:, :bucket] = 0
        slots = self._slots.of([share.sequence.pages for share in shares])
        columns: list[tuple[int, int, int, int, int, int]] = []
        chosen = []
        for share, slot in zip(shares, slots, strict=True):
            need = share.sequence.pages.need
            own = self._kind(share)
            kind, packed = (0, 0) if own is None else (kinds.index(own), need.packed_groups)
            if share.count > 1:
                kind += len(kinds)
            tokens = share.tokens if share.carried is None else (-1 - share.carried,)
            for place, (token, more) in enumerate(zip(tokens, together(share.count, self._queries), strict=True)):
                columns.append((token, slot, packed, share.start + place + 1, kind, more))
            if share.samples:
                chosen.append(len(columns) - 1)
        stage[:6, : len(columns)] = torch.tensor(columns, dtype=torch.int32).T
        stage[6, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        return stage

    def _kind(self, share: Share) -> _Kinds | None:
        """What a sequence's packed pages hold; None: it has none, or they are plain pages."""
        need = share.sequence.pages.need
        k, v = packed_kind(need.k_format), packed_kind(need.v_format)
        return (k, v) if need.packed_groups and k is not None and v is not None else None

    def _kinds(self, shares: Sequence[Share]) -> tuple[_Kinds, ...]:
        """Those of a step; sequences that have none go with the first, or with the usual one."""
        kinds = {kind for kind in map(self._kind, shares) if kind is not None}
        in_order = sorted(kinds, key=lambda pair: [(each.elements, each.scales) for each in pair])
        return tuple(in_order) or ((self._expected[0], self._expected[0]),)

    def _graph(self, bucket: int, kinds: tuple[_Kinds, ...], *, extends: bool) -> _Graph:
        graph = self._graphs.get((bucket, kinds, extends))
        if graph is None:
            graph = self._graphs[bucket, kinds, extends] = self._capture(bucket, kinds, extends=extends)
        return graph

    def _capture(self, bucket: int, kinds: tuple[_Kinds, ...], *, extends: bool) -> _Graph:
        device = self._model.device
        run, works = self._kernels(bucket, kinds, extends=extends)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        # What a larger step left there would point at rows that this one does not have.
        self._inputs.zero_()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            logits, greedy = run()
        return _Graph(graph, logits, greedy, works)

    def _kernels(
        self, bucket: int, kinds: tuple[_Kinds, ...], *, extends: bool
    ) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], list[AttentionWork]]:
        """What enqueues a step and gives its logits and likeliest tokens, and whose memory that writes to."""
        token, slot, packed, length, kind, more, chosen = self._inputs[:, :bucket]
        rows = StepRows(slot, packed, length, kind, more)
        readers = list(product((1, self._queries) if extends else (1,), kinds))
        works = [self._work(rows, number, queries) for number, (queries, _) in enumerate(readers)]
        pages = [
            [LayerPages(layer, self._slots.k_table, self._slots.v_table, *pair) for layer in self._memory]
            for _, pair in readers
        ]
        memory = StepMemory(token, self._last, self._chosen[:bucket], rows)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            self._chosen[:bucket].copy_(chosen)
            logits = self._model.run(memory, pages, works)
            return logits, logits.argmax(-1)

        return run, works

    def _work(self, rows: StepRows, kind: int, queries: int) -> AttentionWork:
        config = self._model.config
        shape = AttentionShape(
            len(rows.slot),
            config.num_kv_heads,
            config.group_size,
            config.head_dim,
            self._programs[queries],
            _LEAST_PAGES,
            queries,
        )
        return AttentionWork(shape, rows, kind, self._model.device, self._parts[queries])


class _Slots:
    """Page tables on the device; a sequence's is written when it first runs or has other pages than before."""

    def __init__(self, slots: int, pages: int, device: torch.device, arrivals: torch.cuda.Stream | None) -> None:
        self._tables = torch.zeros((2, slots, pages), dtype=torch.int32, device=device)
        self.k_table, self.v_table = self._tables
        self._arrivals = arrivals
        # Of each: its slot, and the plain pages that are in its table (a change makes a new tensor of them).
        self._held: OrderedDict[Reservation, tuple[int, torch.Tensor]] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))

    def of(self, reservations: Sequence[Reservation]) -> list[int]:
        """Slots of a step's sequences."""
        return [self._slot(reservation) for reservation in reservations]

    def _slot(self, held: Reservation) -> int:
        slot, plain = self._held.get(held, (-1, None))
        if slot < 0:
            # Who ran longest ago cannot be in this step: there are twice as many slots as sequences.
            slot = self._free.pop() if self._free else self._held.popitem(last=False)[1][0]
        if plain is not held.plain_k:
            self._held[held] = (slot, held.plain_k)
            self._write(slot, held)
        self._held.move_to_end(held)
        return slot

    def _write(self, slot: int, held: Reservation) -> None:
        if self._arrivals is not None:
            torch.cuda.current_stream(self._tables.device).wait_stream(self._arrivals)
        pages = torch.stack([torch.cat([held.packed_k, held.plain_k]), torch.cat([held.packed_v, held.plain_v])])
        table = pages.int().pin_memory()
        self._tables[:, slot, : table.shape[1]].copy_(table, non_blocking=True)


class _GpuStep:
    """See `Step`."""

    def __init__(self, logits: torch.Tensor, greedy: torch.Tensor, last: torch.Tensor) -> None:
        self._logits = logits
        self._greedy = greedy
        self._last = last
        self._host: Drawn | None = None
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def draw(self, rows: Rows, inputs: Inputs, occurrences: Occurrences) -> None:
        if rows == Rows() and inputs.banned is None and inputs.masked is None:
            drawn = Drawn(self._greedy)
        else:
            drawn = sample(self._logits.float(), rows, inputs, occurrences)
        self._last[: len(drawn.tokens)].copy_(drawn.tokens)
        reported = (drawn.chosen, drawn.top_tokens, drawn.top_logprobs)
        self._host = Drawn(_to_pinned(drawn.tokens), *map(_optional_to_pinned, reported))
        self._done.record()

    def drawn(self) -> DrawnTokens:
        assert self._host is not None
        self._done.synchronize()
        return to_host(self._host)


def _to_pinned(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _optional_to_pinned(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else _to_pinned(values)
