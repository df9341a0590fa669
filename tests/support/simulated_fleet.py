"""Workers on a virtual clock under the router's real admission and placement. Simulated, all of it.

A simulated prefill worker computes one prompt after the other; a simulated decode worker steps its batch. What they
take follows the same cost model that real workers fit, which here is simply true; they report it like real ones, late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hma_serve.core.cost_model import StepCost, TransferCost
from hma_serve.core.request import Slo
from hma_serve.core.worker import DeviceInfo, WorkerRole
from hma_serve.router.admission import Admission, Claim, Policy
from hma_serve.router.fleet import Fleet, Load, Share, WorkerView
from hma_serve.router.placement import Demand, Placement
from support.fake_workers import fake_worker

REPORT_SECONDS = 0.25


class SimulatedWorker:
    """What both kinds have: a record, a load, and a view that is as old as the last report."""

    def __init__(
        self, role: WorkerRole, instance: str, cost: StepCost, *, price: float, slots: int, kv_tokens: int
    ) -> None:
        info = fake_worker(
            role, instance=instance, max_running=slots, max_model_len=1 << 16, kv_capacity_tokens=kv_tokens
        )
        self.cost = cost
        self.reports = 0
        self.view = WorkerView(replace(info, device=DeviceInfo(price_per_hour=price)), self.load())

    def load(self) -> Load:
        raise NotImplementedError

    def report(self, now: float) -> None:
        self.reports += 1
        self.view = replace(self.view, load=self.load(), load_at=now, unseen=Share())

    def take(self, *tokens: int) -> tuple[tuple[int, ...], int]:
        view = self.view
        ours, unseen = view.ours.plus(*tokens), view.unseen.plus(*tokens)
        self.view = replace(view, ours=ours, unseen=unseen, placed=view.placed + 1)
        return tokens, self.reports

    def give_back(self, tokens: tuple[int, ...], reports: int) -> None:
        view = self.view
        unseen = view.unseen.minus(*tokens) if reports == self.reports else view.unseen
        self.view = replace(view, ours=view.ours.minus(*tokens), unseen=unseen)


class SimulatedPrefill(SimulatedWorker):
    """Computes prompts in the order in which they come."""

    def __init__(self, instance: str, cost: StepCost, *, price: float = 1.0, slots: int = 8) -> None:
        self.free_at = 0.0
        self.requests = 0
        super().__init__(WorkerRole.PREFILL, instance, cost, price=price, slots=slots, kv_tokens=0)

    def load(self) -> Load:
        now = asyncio.get_running_loop().time()
        queue = max(0.0, self.free_at - now)
        return Load(
            running=self.requests, queue_seconds=queue, cost=self.cost, transfer=TransferCost(1000, 1e9, 0.002, 36)
        )

    async def compute(self, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        self.requests += 1
        self.free_at = max(self.free_at, loop.time()) + self.cost.prompt(tokens)
        await asyncio.sleep(self.free_at - loop.time() + 0.002)
        self.requests -= 1


class SimulatedDecode(SimulatedWorker):
    """Steps its batch; `resident` requests of others never end."""

    def __init__(
        self,
        instance: str,
        cost: StepCost,
        *,
        price: float = 1.0,
        slots: int = 64,
        kv_tokens: int = 200_000,
        resident: int = 0,
        resident_tokens: int = 0,
    ) -> None:
        self.batch = resident
        self.context = resident * resident_tokens
        self.reserved = self.context
        self.kv_tokens = kv_tokens
        super().__init__(WorkerRole.DECODE, instance, cost, price=price, slots=slots, kv_tokens=kv_tokens)

    def load(self) -> Load:
        return Load(
            running=self.batch,
            kv_used_tokens=self.reserved,
            kv_capacity_tokens=self.kv_tokens,
            kv_free_tokens=self.kv_tokens - self.reserved,
            context_tokens=self.context,
            cost=self.cost,
        )

    async def decode(self, prompt: int, tokens: int) -> float:
        """Runs one request; the moment of its first token."""
        loop = asyncio.get_running_loop()
        self.batch += 1
        self.context += prompt
        self.reserved += prompt + tokens
        first = 0.0
        for _ in range(tokens):
            await asyncio.sleep(self.cost.batch(self.batch, self.context))
            self.context += 1
            first = first or loop.time()
        self.batch -= 1
        self.context -= prompt + tokens
        self.reserved -= prompt + tokens
        return first


@dataclass(frozen=True)
class Arrival:
    """One request of a replayed load: seconds after the start, tokens of prompt and answer, objectives."""

    at: float
    prompt: int
    answer: int
    slo: Slo


@dataclass
class Outcome:
    """What became of it."""

    ttft: float
    tpot: float
    predicted_ttft: float
    predicted_tpot: float
    attained: bool
    dollars: float


@dataclass
class SimulatedFleet:
    """`Capacity` over simulated workers."""

    prefills: list[SimulatedPrefill]
    decodes: list[SimulatedDecode]
    report_seconds: float = REPORT_SECONDS
    listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def fleet(self) -> Fleet:
        return Fleet(tuple(w.view for w in self.prefills), tuple(w.view for w in self.decodes))

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def hold(self, placement: Placement, demand: Demand) -> Hold:
        return Hold(self, placement, demand)

    def changed(self) -> None:
        for listener in self.listeners:
            listener()

    def workers(self) -> dict[str, SimulatedWorker]:
        return {worker.view.info.instance: worker for worker in (*self.prefills, *self.decodes)}

    async def report(self) -> None:
        """Reports now and then, until it is cancelled."""
        while True:
            for worker in self.workers().values():
                worker.report(asyncio.get_running_loop().time())
            self.changed()
            await asyncio.sleep(self.report_seconds)

    async def replay(self, arrivals: list[Arrival], policy: Policy) -> list[Outcome]:
        """Runs the whole load under a policy."""
        reports = asyncio.create_task(self.report())
        await asyncio.sleep(0)
        admission = Admission(self, policy=policy, max_wait=1e6)
        start = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(*(self._serve(admission, start, arrival) for arrival in arrivals))
        admission.close()
        reports.cancel()
        return list(outcomes)

    async def _serve(self, admission: Admission, start: float, arrival: Arrival) -> Outcome:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(arrival.at)
        arrived = start + arrival.at
        demand = Demand(arrival.prompt, arrival.answer, arrival.slo, arrived)
        held = await admission.acquire(Claim(demand, arrived, arrived + 1e6))
        placement, workers = held.placement, self.workers()
        decode = workers[placement.decode.instance]
        assert isinstance(decode, SimulatedDecode)
        if placement.prefill is not None:
            prefill = workers[placement.prefill.instance]
            assert isinstance(prefill, SimulatedPrefill)
            await prefill.compute(placement.packed_tokens)
        held.release_prefill()
        first = await decode.decode(arrival.prompt, arrival.answer)
        held.release()
        ttft, tpot = first - arrived, (loop.time() - first) / max(1, arrival.answer - 1)
        attained = ttft <= (arrival.slo.ttft or ttft) and tpot <= (arrival.slo.tpot or tpot)
        expected = placement.prediction
        return Outcome(ttft, tpot, expected.ttft, expected.tpot, attained, expected.dollars)


class Hold:
    """What a request has on its workers."""

    def __init__(self, fleet: SimulatedFleet, placement: Placement, demand: Demand) -> None:
        self.placement = placement
        self._fleet = fleet
        decode, prefill, workers = placement.decode, placement.prefill, fleet.workers()
        kv_tokens = demand.kv_tokens(decode.limits)
        self._parts = {decode.instance: workers[decode.instance].take(demand.prompt_tokens, kv_tokens)}
        if prefill is not None:
            self._parts[prefill.instance] = workers[prefill.instance].take(placement.packed_tokens)

    def release_prefill(self) -> None:
        if self.placement.prefill is not None:
            self._give_back(self.placement.prefill.instance)

    def release(self) -> None:
        for instance in list(self._parts):
            self._give_back(instance)

    def _give_back(self, instance: str) -> None:
        if instance in self._parts:
            self._fleet.workers()[instance].give_back(*self._parts.pop(instance))
            self._fleet.changed()
