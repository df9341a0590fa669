"""What a request would take on each worker, predicted from what the workers publish.

TTFT = waited so far + queue of the prefill worker + computing what no cache holds + transfer that computing does not
hide + first decode step. TPOT = a step of the decode worker's batch with the request in it, half of its answer
written. Dollars = what the request adds to its workers' busy seconds, at their prices: on decode that is the growth of
each step and not its whole, so a full batch and an empty one cost the same and room decides between them.

Both halves are predicted once for each worker and then only added up for each pair.

Dollars are those of the worker's *kind* (device, price and profile), which all of a kind measure together: what two
equal workers measured differs by chance, and by chance alone one of them would get every request. That one of a kind is
slower than the others shows in its times.

A worker that has measured little counts as its kind, and one that has measured nothing as the fastest measured one of
its role: it gets work and so learns what it costs. A price that is not stated counts as the mean of those stated in the
role; where none is, an hour of any worker costs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hma_serve.core.cost_model import StepCost, TransferCost, attended_pairs
from hma_serve.router.fleet import WorkerView
from hma_serve.router.pairing import bf16_bytes_per_token

STALE_SECONDS = 3.0
"""A report that is older says nothing about progress: the queue that it told of is taken for as long as ever."""

EXPECTED_TOKENS = 256
"""Length of an answer for the sake of prices and of the context in mid-answer; less where the request allows less."""

_HOUR = 3600.0
_ANY_PRICE = 1.0
_YARDSTICK_TOKENS = 1024
# Steps that a worker must have measured before its own model is better than that of its kind.
_ENOUGH = 16


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is to be expected of a placement.

    Attributes:
        ttft: Seconds from the request's arrival to its first token.
        tpot: Seconds between two tokens.
        dollars: What it adds to the workers' busy time, at their prices.
        measured: The workers' cost models knew enough to say so.
    """

    ttft: float = 0.0
    tpot: float = 0.0
    dollars: float = 0.0
    measured: bool = False


@dataclass(frozen=True, slots=True)
class PrefillOutlook:
    """A request on one prefill worker.

    Attributes:
        view: The worker.
        queue: Seconds until it begins.
        computing: Seconds that it computes.
        packed: Tokens that it sends.
        transfer: What sending them costs in its own codecs.
        dollars: Of the computation.
        measured: Its model knows anything.
    """

    view: WorkerView
    queue: float
    computing: float
    packed: int
    transfer: TransferCost
    dollars: float
    measured: bool

    def delivery(self, as_bf16: int) -> float:
        """Seconds from now until decode has the KV, so many of the two roles (K, V) sent as BF16."""
        transfer = self.transfer
        if as_bf16:
            wider = as_bf16 * (bf16_bytes_per_token(self.view.info.model) - transfer.bytes_per_token // 2)
            transfer = replace(transfer, bytes_per_token=transfer.bytes_per_token + wider)
        return self.queue + self.computing + transfer.exposed(self.packed, self.computing)


@dataclass(frozen=True, slots=True)
class DecodeOutlook:
    """A request on one decode worker.

    Attributes:
        view: The worker.
        first: Seconds from the KV's arrival to the first token.
        alone: Seconds to the first token if it computes the whole prompt itself.
        tpot: Seconds between two tokens.
        dollars: Of the answer.
        alone_dollars: Of the prompt too.
        measured: Its model knows anything.
    """

    view: WorkerView
    first: float
    alone: float
    tpot: float
    dollars: float
    alone_dollars: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Work:
    """A request, as far as its cost goes.

    Attributes:
        prompt: Tokens.
        packed: Those that prefill would compute.
        answer: Tokens at most.
    """

    prompt: int
    packed: int
    answer: int

    @property
    def expected(self) -> int:
        """Tokens of the answer that are counted with."""
        return min(self.answer, EXPECTED_TOKENS)


class Yardstick:
    """What stands in for what the workers of one role do not say.

    Args:
        views: All of them.
    """

    def __init__(self, views: Sequence[WorkerView]) -> None:
        kinds: dict[object, list[StepCost]] = {}
        for view in views:
            if (cost := _cost(view)).known:
                kinds.setdefault(_kind(view), []).append(cost)
        known = [cost for costs in kinds.values() for cost in costs]
        self._fastest = min(known, key=lambda cost: cost.prompt(_YARDSTICK_TOKENS), default=StepCost())
        self._kinds = {kind: StepCost.mean(costs) for kind, costs in kinds.items()}
        stated = [price for view in views if (price := view.info.device.price_per_hour) > 0]
        self._price = sum(stated) / len(stated) if stated else _ANY_PRICE

    def cost(self, view: WorkerView) -> StepCost:
        """What the worker's steps take: by its own model, that of its kind, or that of the fastest."""
        own = _cost(view)
        if own.measurements >= _ENOUGH:
            return own
        return self.kind_cost(view) if own.known else self._fastest

    def kind_cost(self, view: WorkerView) -> StepCost:
        """What steps take on workers of its kind."""
        return self._kinds.get(_kind(view), self._fastest)

    def price(self, view: WorkerView) -> float:
        """Dollars of one second."""
        return (view.info.device.price_per_hour or self._price) / _HOUR


def prefill_outlooks(
    views: Iterable[WorkerView], work: Work, cached: Mapping[str, int], now: float
) -> list[PrefillOutlook]:
    """A request on each prefill worker.

    Args:
        views: The workers.
        work: The request.
        cached: Prompt tokens that a worker's prefix cache is known to hold, by instance.
        now: Seconds of the clock that the views' times use.
    """
    views = tuple(views)
    yardstick = Yardstick(views)
    outlooks = []
    for view in views:
        cost = yardstick.cost(view)
        held = min(cached.get(view.info.instance, 0), work.packed)
        computing = cost.prompt(work.packed - held, before=held)
        priced = yardstick.kind_cost(view).prompt(work.packed - held, before=held)
        transfer = view.load.transfer if view.load is not None else TransferCost()
        dollars = priced * yardstick.price(view)
        queue = _queue(view, cost, now)
        outlooks.append(PrefillOutlook(view, queue, computing, work.packed, transfer, dollars, cost.known))
    return outlooks


def decode_outlooks(views: Iterable[WorkerView], work: Work) -> list[DecodeOutlook]:
    """A request on each decode worker."""
    views = tuple(views)
    yardstick = Yardstick(views)
    return [_decode_outlook(view, work, yardstick) for view in views]


def _decode_outlook(view: WorkerView, work: Work, yardstick: Yardstick) -> DecodeOutlook:
    cost, priced, price = yardstick.cost(view), yardstick.kind_cost(view), yardstick.price(view)
    batch = view.requests
    context = (view.load.context_tokens if view.load else 0) + view.unreported.tokens
    step = cost.batch(batch, context)
    # It comes in the middle of a step, and the next one computes its last prompt tokens.
    tail = work.prompt - work.packed
    tail_seconds = cost.backlog(0, tail, attended_pairs(tail, work.packed))
    prompt_seconds = cost.backlog(0, work.prompt, attended_pairs(work.prompt))
    middle = work.prompt + work.expected / 2
    tpot = cost.batch(batch + 1, context + middle)
    answer = work.expected * (priced.token + priced.context * middle)
    return DecodeOutlook(
        view=view,
        first=1.5 * step + tail_seconds if batch else cost.fixed + tail_seconds,
        alone=0.5 * step + cost.steps(work.prompt, beside=batch) * max(step, cost.fixed) + prompt_seconds,
        tpot=tpot,
        dollars=(answer + priced.backlog(0, tail, attended_pairs(tail, work.packed))) * price,
        alone_dollars=(answer + priced.backlog(0, work.prompt, attended_pairs(work.prompt))) * price,
        measured=cost.known,
    )


def _kind(view: WorkerView) -> object:
    return view.info.device, view.info.profile


def _cost(view: WorkerView) -> StepCost:
    return view.load.cost if view.load is not None else StepCost()


def _queue(view: WorkerView, cost: StepCost, now: float) -> float:
    """Seconds until the worker could begin."""
    reported = 0.0
    if view.load is not None:
        measured = view.load.cost.known
        reported = view.load.queue_seconds if measured else cost.token * view.load.queued_tokens
        age = now - view.load_at
        if age <= STALE_SECONDS:
            reported = max(0.0, reported - age)
    extra = view.unreported
    steps = extra.requests + (extra.tokens / cost.step_tokens if cost.step_tokens else 0.0)
    return reported + cost.backlog(steps, extra.tokens, extra.pairs)
