"""Where a request runs: a pure function of the request, the fleet and the time.

Of all pairs with room that can read each other's KV, in this order:

1. those with the fewest reservations: a worker that failed this very request, another profile than the one that its
   first tokens came from, a worker that has gone quiet;
2. those predicted to meet the request's objectives, or else to miss them by the least factor;
3. the cheapest in dollars, what is within 5 % counting as equal, and so do workers of one kind;
4. the one with the most headroom: below its objectives, in slots and in memory; then one whose KV need not be sent as
   BF16, unless it is much fuller; then the one used less.

A prompt that the chosen pair would not answer sooner than decode alone goes to decode alone, if it is short
(`local_tokens`): the crossover follows from what both measure.

Reports age. Up to `STALE_SECONDS` a queue is taken to shrink as time passes; a worker that is quiet for longer, or
whose engine is, is used only when no other will do; one that is away is waited for during `RECOVERY_SECONDS` and then
counts as gone.

Nothing here waits, retries or counts; the planner drives the same function on a virtual clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from hma_serve.core.groups import GROUP_TOKENS, packed_tokens
from hma_serve.core.request import Slo
from hma_serve.core.worker import WorkerInfo, WorkerLimits, WorkerState
from hma_serve.router.fleet import Fleet, WorkerView
from hma_serve.router.pairing import a_difference, compatible, difference, fallbacks, once_per_kind
from hma_serve.router.prediction import (
    STALE_SECONDS,
    DecodeOutlook,
    Prediction,
    PrefillOutlook,
    Work,
    decode_outlooks,
    prefill_outlooks,
)

RECOVERY_SECONDS = 5.0
"""A worker that has been away for less is expected back: requests wait for it instead of failing."""

LOCAL = "(decode)"
"""The profile of a prompt that decode computed itself."""

_EQUAL_PRICE = 1.05
_EQUAL_MISS = 1.05
_HEADROOM_STEPS = 20
# A decode worker that needs a role (K, V) as BF16 counts as so much fuller than one that takes what prefill has.
_FALLBACK_FULLNESS = 0.125
# Steps of mean length that an engine may be silent for: one with a long prompt in it takes longer than the others.
_SILENT_STEPS = 10
# Workers of a role that are looked at as partners, by each of the things that can make one the best.
_SHORTLIST = 8

_Outlook = TypeVar("_Outlook", PrefillOutlook, DecodeOutlook)


@dataclass(frozen=True, slots=True)
class Demand:
    """What placement needs to know of a request.

    Attributes:
        prompt_tokens: Length of the prompt.
        max_tokens: Length of the completion at most.
        slo: Objectives.
        arrived: When it came to the router, seconds of the fleet's clock; None: now.
        avoid: Instances that failed this request before; used only when no other will do.
        profile: What computed its prompt before it had to move, `LOCAL` for decode itself; None: nothing has yet.
        cached: Prompt tokens that a prefill worker's cache is known to hold, by instance.
        emitted_tokens: Of the completion, computed before it had to move.
    """

    prompt_tokens: int
    max_tokens: int
    slo: Slo = field(default_factory=Slo)
    arrived: float | None = None
    avoid: frozenset[str] = frozenset()
    profile: str | None = None
    cached: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    emitted_tokens: int = 0

    @property
    def packed_tokens(self) -> int:
        """Tokens for a prefill worker; 0 when decode computes the whole prompt in any case."""
        return packed_tokens(self.prompt_tokens)

    @property
    def total_tokens(self) -> int:
        """Window that the request may fill."""
        return self.prompt_tokens + self.max_tokens

    def kv_tokens(self, decode: WorkerLimits) -> int:
        """Tokens of KV to count for it on a decode worker until that reports it: what it takes unquantised.

        All that it may ever need, or what it has and the first new token where memory is overcommitted; in whole
        groups. The worker decides by more than this: packed pages are as large as their codec makes them, mostly
        smaller, but larger as F32 beside BF16; those of a common prefix are not taken again; free memory may be in
        pieces that only another codec fits; and one that overcommits refuses whom it could not let finish.
        """
        needed = self.prompt_tokens + self.emitted_tokens + 1 if decode.overcommit else self.total_tokens
        return math.ceil(needed / GROUP_TOKENS) * GROUP_TOKENS


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers that serve a request.

    Attributes:
        decode: Samples every token.
        prefill: Computes the packed tokens; None: decode computes the whole prompt itself.
        packed_tokens: Tokens that come from prefill; 0 without one.
        prediction: What is expected.
    """

    decode: WorkerInfo
    prefill: WorkerInfo | None
    packed_tokens: int
    prediction: Prediction = field(default_factory=Prediction)

    @property
    def profile(self) -> str:
        """What computes the prompt."""
        return LOCAL if self.prefill is None else self.prefill.profile


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
        waits_for: Decode instances, room on any of which is all that it lacks; none: it needs a prefill worker first.
    """

    why: Why
    message: str
    waits_for: frozenset[str] = frozenset()


def place(
    demand: Demand, fleet: Fleet, now: float, *, local_prefill: bool = True, local_tokens: int = 0
) -> Placement | Reject:
    """Picks the best pair; the module says what that is.

    Args:
        demand: The request.
        fleet: The workers of the request's model.
        now: Seconds of the clock that the fleet's times use.
        local_prefill: Let decode compute long prompts while there is no prefill worker.
        local_tokens: Longest prompt that decode may compute itself, if that is faster, while there are prefill workers.
    """
    decodes = [view for view in fleet.decodes if _expected(view, now)]
    if not decodes:
        return Reject(Why.NOBODY, "no decode worker is available")
    decodes = [view for view in decodes if demand.total_tokens <= view.window]
    if not decodes:
        return Reject(Why.TOO_LONG, f"no decode worker takes {demand.total_tokens} tokens (prompt and completion)")
    prefills = _prefills(demand, fleet, decodes, now)
    if not prefills and demand.packed_tokens and not local_prefill:
        there = (view.info for view in fleet.prefills if _expected(view, now))
        found = a_difference(there, [view.info for view in decodes])
        return Reject(Why.NOBODY, f"no prefill worker that any decode worker is compatible with is available{found}")
    paired = bool(prefills) and not (demand.profile == LOCAL and local_prefill)
    ready = [view for view in prefills if _prefill_fits(view)]
    free = [view for view in decodes if _decode_fits(view, demand)]
    if not free:
        return Reject(Why.BUSY, "every decode worker is full", _sought(decodes, ready, paired))
    work = Work(demand.prompt_tokens, demand.packed_tokens, demand.max_tokens)
    hosts = decode_outlooks(free, work)
    weigh = _Weighing(demand, now)
    if not paired:
        return _best([weigh.alone(host) for host in hosts], demand.slo).placement
    makers = prefill_outlooks(ready, work, demand.cached, now)
    pairs = weigh.pairs(_shortlist(makers, _MAKER_MERITS), _shortlist(hosts, _HOST_MERITS))
    pairs = pairs or weigh.pairs(makers, hosts)
    if not pairs:
        return Reject(Why.BUSY, "every prefill worker is full", _sought(decodes, ready, paired))
    best = _best(pairs, demand.slo)
    if demand.prompt_tokens <= local_tokens and demand.profile is None and best.prediction.measured:
        alone = _best([weigh.alone(host) for host in hosts], demand.slo)
        if alone.reservations <= best.reservations and alone.prediction.ttft <= best.prediction.ttft:
            return alone.placement
    return best.placement


# Who can serve it. ----------------------------------------------------------------------------------------------------


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
    return not view.kv_capacity or not view.requests or demand.kv_tokens(limits) <= view.kv_free_tokens


def _prefill_fits(view: WorkerView) -> bool:
    limits = view.info.limits
    return view.open and not view.refused and view.requests < limits.max_running + limits.max_waiting


def _sought(decodes: Iterable[WorkerView], ready: Sequence[WorkerView], paired: bool) -> frozenset[str]:
    """Decode instances that a request could begin on if they had room; paired: that a ready prefill can send to."""
    return frozenset(
        view.info.instance
        for view in decodes
        if not paired or any(compatible(prefill.info, view.info) for prefill in ready)
    )


def _quiet(view: WorkerView, now: float) -> bool:
    """Whether nothing new is known of the worker: its last report is old, or its engine tells its front nothing."""
    if view.load is None or now - view.load_at > STALE_SECONDS:
        return True
    return view.load.engine_silent_seconds > max(STALE_SECONDS, _SILENT_STEPS * view.load.step_seconds)


def _fullness(view: WorkerView) -> float:
    """Of slots or memory, whichever is scarcer; 1 is full."""
    limits = view.info.limits
    slots = view.requests / max(1, limits.max_running + limits.max_waiting)
    return max(slots, view.kv_tokens / view.kv_capacity if view.kv_capacity else 0.0)


# Which of them is best. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to serve a request.

    Attributes:
        placement: The workers, with what is predicted.
        reservations: What speaks against them whatever is predicted; compared in order.
        fullness: Of the decode worker.
        order: Breaks ties: what a cache holds, then load, then use.
    """

    placement: Placement
    reservations: tuple[int, ...]
    fullness: float
    order: tuple[float, ...]

    @property
    def prediction(self) -> Prediction:
        return self.placement.prediction

    def miss(self, slo: Slo) -> float:
        """The factor by which it exceeds the objectives; at most 1: it meets them."""
        misses = [took / aim for took, aim in self._measures(slo)]
        return max(1.0, *misses) if misses else 1.0

    def headroom(self, slo: Slo) -> int:
        """Room below the objectives and on the decode worker, the scarcest of them, in steps."""
        room = [1.0 - took / aim for took, aim in self._measures(slo)]
        return int(min(1.0 - self.fullness, *room) * _HEADROOM_STEPS) if room else 0

    def _measures(self, slo: Slo) -> list[tuple[float, float]]:
        both = ((self.prediction.ttft, slo.ttft), (self.prediction.tpot, slo.tpot))
        return [(took, aim) for took, aim in both if aim is not None]


class _Weighing:
    """Makes options of outlooks.

    Args:
        demand: The request.
        now: As in `place`.
    """

    def __init__(self, demand: Demand, now: float) -> None:
        self._demand = demand
        self._now = now
        self._waited = 0.0 if demand.arrived is None else max(0.0, now - demand.arrived)

    def alone(self, host: DecodeOutlook) -> _Option:
        """Decode computes the whole prompt."""
        prediction = Prediction(self._waited + host.alone, host.tpot, host.alone_dollars, host.measured)
        return self._option(host, None, prediction)

    def pairs(self, makers: Sequence[PrefillOutlook], hosts: Sequence[DecodeOutlook]) -> list[_Option]:
        """Every compatible pair."""
        roles = once_per_kind(lambda maker, host: None if difference(maker, host) else fallbacks(maker, host))
        return [
            self._option(host, maker, self._prediction(maker, host, as_bf16), as_bf16)
            for maker in makers
            for host in hosts
            if (as_bf16 := roles(maker.view.info, host.view.info)) is not None
        ]

    def _prediction(self, maker: PrefillOutlook, host: DecodeOutlook, as_bf16: int) -> Prediction:
        ttft = self._waited + maker.delivery(as_bf16) + host.first
        return Prediction(ttft, host.tpot, maker.dollars + host.dollars, maker.measured and host.measured)

    def _option(
        self, host: DecodeOutlook, maker: PrefillOutlook | None, prediction: Prediction, as_bf16: int = 0
    ) -> _Option:
        demand = self._demand
        used = [host.view] if maker is None else [host.view, maker.view]
        if maker is None:
            placement = Placement(host.view.info, None, 0, prediction)
        else:
            placement = Placement(host.view.info, maker.view.info, demand.packed_tokens, prediction)
        reservations = (
            sum(view.info.instance in demand.avoid for view in used),
            int(demand.profile not in (None, placement.profile)),
            sum(_quiet(view, self._now) for view in used),
        )
        fullness = _fullness(host.view)
        order = [fullness + as_bf16 * _FALLBACK_FULLNESS, float(host.view.placed)]
        if maker is not None:
            order.insert(0, -float(demand.cached.get(maker.view.info.instance, 0)))
            order += [float(maker.view.prefill_tokens), float(maker.view.requests), float(maker.view.placed)]
        return _Option(placement, reservations, fullness, tuple(order))


def _best(options: Sequence[_Option], slo: Slo) -> _Option:
    """The best of at least one."""
    least = min(option.reservations for option in options)
    options = [option for option in options if option.reservations == least]
    miss = min(option.miss(slo) for option in options) * _EQUAL_MISS if slo != Slo() else 1.0
    miss = 1.0 if miss <= _EQUAL_MISS else miss
    options = [option for option in options if option.miss(slo) <= miss]
    dollars = min(option.prediction.dollars for option in options) * _EQUAL_PRICE
    options = [option for option in options if option.prediction.dollars <= dollars]
    return min(options, key=lambda option: (-option.headroom(slo), option.order, _names(option)))


def _names(option: _Option) -> tuple[str, str]:
    prefill = option.placement.prefill
    return option.placement.decode.instance, prefill.instance if prefill is not None else ""


_MAKER_MERITS: tuple[Callable[[PrefillOutlook], float], ...] = (
    lambda maker: maker.delivery(0),
    lambda maker: maker.dollars,
    lambda maker: maker.view.placed,
)
_HOST_MERITS: tuple[Callable[[DecodeOutlook], float], ...] = (
    lambda host: host.first,
    lambda host: host.tpot,
    lambda host: host.dollars,
    lambda host: _fullness(host.view),
    lambda host: host.view.placed,
)


def _shortlist(outlooks: Sequence[_Outlook], merits: Sequence[Callable[[_Outlook], float]]) -> Sequence[_Outlook]:
    """The best by each merit, so that large fleets cost no more than a few hundred pairs; all of a small one."""
    if len(outlooks) <= _SHORTLIST * len(merits):
        return outlooks
    best: dict[str, _Outlook] = {}
    for merit in merits:
        best |= {one.view.info.instance: one for one in sorted(outlooks, key=merit)[:_SHORTLIST]}
    return list(best.values())
