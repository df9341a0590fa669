"""Placement by prediction against round robin: the same replayed load, unlike workers, virtual time. Simulated."""

from __future__ import annotations

import itertools
import random

import pytest

from hma_serve.core.cost_model import StepCost
from hma_serve.core.request import Slo
from hma_serve.router.admission import Policy
from hma_serve.router.fleet import Fleet
from hma_serve.router.placement import Demand, Placement, Reject, Why, place
from support.simulated_fleet import REPORT_SECONDS, Arrival, Outcome, SimulatedDecode, SimulatedFleet, SimulatedPrefill
from support.virtual_loop import virtual

FAST = StepCost(fixed=0.004, token=8e-5, pair=1e-8, step_tokens=512, measurements=100)
SLOW = StepCost(fixed=0.012, token=24e-5, pair=3e-8, step_tokens=512, measurements=100)
DECODE = StepCost(fixed=0.008, token=1e-4, context=1.5e-7, step_tokens=256, measurements=100)
OBJECTIVES = Slo(ttft=1.0, tpot=0.030)


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; prompts and answers of widely different lengths."""
    draw, at, load = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        prompt = int(min(8000, draw.lognormvariate(7.0, 0.8)))
        answer = int(min(400, 2 + draw.expovariate(1 / 80)))
        load.append(Arrival(at, max(33, prompt), answer, OBJECTIVES))
    return load


def unlike_fleet(report_seconds: float = REPORT_SECONDS) -> SimulatedFleet:
    """One prefill worker is three times slower, one decode worker is nearly full of long contexts."""
    return SimulatedFleet(
        [SimulatedPrefill("p-fast", FAST), SimulatedPrefill("p-slow", SLOW)],
        [
            SimulatedDecode("d-empty", DECODE),
            SimulatedDecode("d-full", DECODE, resident=40, resident_tokens=4000),
        ],
        report_seconds,
    )


def round_robin() -> Policy:
    """Workers in turn, if they have room; else waits like the real one."""
    turns = itertools.count()

    def policy(demand: Demand, fleet: Fleet, now: float) -> Placement | Reject:
        turn = next(turns)
        prefill, decode = fleet.prefills[turn % 2], fleet.decodes[turn % 2]
        outcome = place(demand, Fleet((prefill,), (decode,)), now)
        return outcome if isinstance(outcome, Placement) else Reject(Why.BUSY, "full")

    return policy


def attained(outcomes: list[Outcome]) -> float:
    return sum(outcome.attained for outcome in outcomes) / len(outcomes)


async def replay(load: list[Arrival], policy: Policy) -> list[Outcome]:
    return await unlike_fleet().replay(load, policy)


@pytest.mark.parametrize("seed", [1, 2, 3])
@virtual
async def test_more_requests_meet_their_objectives_than_under_round_robin(seed: int) -> None:
    load = arrivals(rate=4.0, seconds=60, seed=seed)
    ours = attained(await replay(load, place))
    in_turn = attained(await replay(load, round_robin()))
    assert ours >= 0.9
    assert ours >= in_turn + 0.2


@pytest.mark.parametrize("report_seconds", [2.5, 20.0])
@virtual
async def test_without_fresh_reports_a_router_goes_by_what_it_placed_itself(report_seconds: float) -> None:
    load = arrivals(rate=4.0, seconds=60, seed=1)
    assert attained(await unlike_fleet(report_seconds).replay(load, place)) >= 0.9


@virtual
async def test_what_was_predicted_comes_true() -> None:
    outcomes = await replay(arrivals(rate=3.0, seconds=60, seed=4), place)
    ratios = sorted(outcome.ttft / outcome.predicted_ttft for outcome in outcomes)
    assert 0.8 < ratios[len(ratios) // 2] < 1.2
    paces = sorted(outcome.tpot / outcome.predicted_tpot for outcome in outcomes if outcome.tpot > 0)
    assert 0.7 < paces[len(paces) // 2] < 1.3


def two_prices() -> SimulatedFleet:
    """A dear fast prefill worker and a cheap slow one."""
    return SimulatedFleet(
        [SimulatedPrefill("p-fast", FAST, price=9.0), SimulatedPrefill("p-slow", SLOW, price=1.0)],
        [SimulatedDecode("d", DECODE)],
    )


@virtual
async def test_the_cheap_worker_is_used_as_long_as_objectives_allow() -> None:
    relaxed = [
        Arrival(load.at, load.prompt, load.answer, Slo(ttft=30.0)) for load in arrivals(rate=1.0, seconds=40, seed=5)
    ]
    fleet = two_prices()
    assert attained(await fleet.replay(relaxed, place)) == 1.0
    assert fleet.prefills[0].view.placed == 0
    hurried = [Arrival(load.at, load.prompt, load.answer, Slo(ttft=0.5)) for load in relaxed]
    fleet = two_prices()
    assert attained(await fleet.replay(hurried, place)) > 0.8
    assert fleet.prefills[0].view.placed > 0 < fleet.prefills[1].view.placed
