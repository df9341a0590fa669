"""Where a request runs: a pure function of the request, the fleet and the time.

The first policy is the least loaded compatible pair. Nothing here waits, retries or counts; the planner drives the same
function on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from hma_serve.core.groups import packed_tokens
from hma_serve.core.request import Slo
from hma_serve.core.worker import WorkerInfo, WorkerState
from hma_serve.router.fleet import Fleet, WorkerView

RECOVERY_SECONDS = 5.0
"""A worker that has been away for less is expected back: requests wait for it instead of failing."""

STALE_SECONDS = 3.0
"""A worker whose last report is older is used only when no other will do."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What placement needs to know of a request.

    Attributes:
        prompt_tokens: Length of the prompt.
        max_tokens: Length of the completion at most.
        slo: Objectives; not used by the least-loaded policy.
        avoid: Instances that failed this request before; used only when no other will do.
    """

    prompt_tokens: int
    max_tokens: int
    slo: Slo = field(default_factory=Slo)
    avoid: frozenset[str] = frozenset()

    @property
    def packed_tokens(self) -> int:
        """Tokens for a prefill worker; 0 when decode computes the whole prompt in any case."""
        return packed_tokens(self.prompt_tokens)

    @property
    def total_tokens(self) -> int:
        """Window that the request may fill."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers that serve a request.

    Attributes:
        decode: Samples every token.
        prefill: Computes the packed tokens; None: decode computes the whole prompt itself.
        packed_tokens: Tokens that come from prefill; 0 without one.
    """

    decode: WorkerInfo
    prefill: WorkerInfo | None
    packed_tokens: int


class Why(StrEnum):
    """Why a request cannot be placed now."""

    BUSY = "busy"
    """Somebody could serve it, later: wait."""
    NOBODY = "nobody"
    """No worker that is alive could serve it."""
    TOO_LONG = "too_long"
    """No worker's window is large enough."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The other outcome of placement.

    Attributes:
        why: Decides whether the request waits.
        message: For the client.
    """

    why: Why
    message: str


def place(demand: Demand, fleet: Fleet, now: float, *, local_prefill: bool = True) -> Placement | Reject:
    """Picks the least loaded compatible pair.

    Args:
        demand: The request.
        fleet: The workers of the request's model.
        now: Seconds of the clock that the fleet's times use.
        local_prefill: Let decode compute long prompts while there is no prefill worker.
    """
    decodes = [view for view in fleet.decodes if _expected(view, now)]
    if not decodes:
        return Reject(Why.NOBODY, "no decode worker is available")
    decodes = [view for view in decodes if demand.total_tokens <= view.window]
    if not decodes:
        return Reject(Why.TOO_LONG, f"no decode worker takes {demand.total_tokens} tokens (prompt and completion)")
    prefills = _prefills(demand, fleet, decodes, now)
    if not prefills and demand.packed_tokens and not local_prefill:
        return Reject(Why.NOBODY, "no prefill worker that any decode worker is compatible with is available")
    free = sorted((view for view in decodes if _decode_fits(view, demand)), key=lambda v: _decode_rank(v, demand, now))
    if not free:
        return Reject(Why.BUSY, "every decode worker is full")
    if not prefills:
        return Placement(free[0].info, None, 0)
    for decode in free:
        partners = [view for view in prefills if compatible(view.info, decode.info) and _prefill_fits(view)]
        if partners:
            prefill = min(partners, key=lambda v: _prefill_rank(v, demand, now))
            return Placement(decode.info, prefill.info, demand.packed_tokens)
    return Reject(Why.BUSY, "every prefill worker is full")


def compatible(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    """Whether decode can read what prefill packs: same model, K offsets and RoPE, codecs accepted."""
    return (
        prefill.model.stream_fingerprint == decode.model.stream_fingerprint
        and prefill.model.rope == decode.model.rope
        and bool(prefill.codecs)
        and all(any(made.decodes_like(read) for read in decode.codecs) for made in prefill.codecs)
    )


def _prefills(demand: Demand, fleet: Fleet, decodes: Iterable[WorkerView], now: float) -> list[WorkerView]:
    """Prefill workers worth using or waiting for; empty when the request needs none or there is none."""
    if not demand.packed_tokens:
        return []
    partners = [view.info for view in decodes]
    return [
        view
        for view in fleet.prefills
        if _expected(view, now)
        and demand.packed_tokens <= view.info.limits.max_model_len
        and any(compatible(view.info, decode) for decode in partners)
    ]


def _expected(view: WorkerView, now: float) -> bool:
    """Whether the worker takes requests, or is likely to in a moment."""
    if view.info.state is not WorkerState.READY or (view.load is not None and view.load.draining):
        return False
    return view.away_since is None or now - view.away_since < RECOVERY_SECONDS


def _decode_fits(view: WorkerView, demand: Demand) -> bool:
    limits = view.info.limits
    if not view.open or view.refused or view.requests >= limits.max_running + limits.max_waiting:
        return False
    # An idle worker decides for itself: refusing here what its own accounting would take could wait for ever.
    return not view.kv_capacity or not view.requests or view.kv_tokens + demand.prompt_tokens <= view.kv_capacity


def _prefill_fits(view: WorkerView) -> bool:
    limits = view.info.limits
    return view.open and not view.refused and view.requests < limits.max_running + limits.max_waiting


def _decode_rank(view: WorkerView, demand: Demand, now: float) -> tuple[bool, bool, float, int, str]:
    limits = view.info.limits
    slots = view.requests / max(1, limits.max_running + limits.max_waiting)
    memory = view.kv_tokens / view.kv_capacity if view.kv_capacity else 0.0
    return (*_reservations(view, demand, now), max(slots, memory), view.placed, view.info.instance)


def _prefill_rank(view: WorkerView, demand: Demand, now: float) -> tuple[bool, bool, int, int, int, str]:
    queue = (view.prefill_tokens, view.requests)
    return (*_reservations(view, demand, now), *queue, view.placed, view.info.instance)


def _reservations(view: WorkerView, demand: Demand, now: float) -> tuple[bool, bool]:
    """What puts a worker behind every other: it failed this very request, or it has gone quiet."""
    return view.info.instance in demand.avoid, now - view.load_at > STALE_SECONDS
