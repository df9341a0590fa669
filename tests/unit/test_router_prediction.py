"""What is predicted, and how placement weighs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hma_serve.core.cost_model import StepCost, TransferCost, attended_pairs
from hma_serve.core.request import Slo
from hma_serve.core.worker import DeviceInfo, WorkerRole
from hma_serve.router.fleet import Fleet, Load, Share, WorkerView
from hma_serve.router.placement import LOCAL, Demand, Placement, place
from hma_serve.router.prediction import STALE_SECONDS
from support.fake_workers import fake_worker

NOW = 1000.0
PREFILL = StepCost(fixed=0.01, token=1e-4, pair=1e-8, step_tokens=512, measurements=9)
DECODE = StepCost(fixed=0.008, token=1e-4, context=1e-7, pair=2e-8, step_tokens=256, measurements=9)
TRANSFER = TransferCost(bytes_per_token=1000, bytes_per_second=1e7, handoff=0.003, layers=4)


def worker(
    role: WorkerRole, instance: str, load: Load, *, price: float = 0.0, profile: str = "", **view: Any
) -> WorkerView:
    info = fake_worker(role, instance=instance, max_model_len=1 << 16)
    info = replace(info, device=DeviceInfo(price_per_hour=price), profile=profile)
    return replace(WorkerView(info, load, load_at=NOW), **view)


def prefill(instance: str = "p", load: Load | None = None, **more: Any) -> WorkerView:
    return worker(WorkerRole.PREFILL, instance, load or Load(cost=PREFILL, transfer=TRANSFER), **more)


def decode(instance: str = "d", load: Load | None = None, **more: Any) -> WorkerView:
    return worker(WorkerRole.DECODE, instance, load or Load(cost=DECODE), **more)


def placed(demand: Demand, fleet: Fleet, **settings: Any) -> Placement:
    outcome = place(demand, fleet, NOW, **settings)
    assert isinstance(outcome, Placement), outcome
    return outcome


def names(placement: Placement) -> tuple[str, str | None]:
    return placement.decode.instance, placement.prefill.instance if placement.prefill else None


def test_ttft_is_queue_and_prefill_and_exposed_transfer_and_a_step() -> None:
    busy = Load(cost=PREFILL, transfer=TRANSFER, running=1, queue_seconds=2.0)
    fleet = Fleet((prefill(load=busy),), (decode(),))
    got = placed(Demand(1000, 100, arrived=NOW - 0.5), fleet).prediction
    computing = PREFILL.prompt(992)
    step = DECODE.fixed + DECODE.backlog(0, 8, attended_pairs(8, 992))
    assert got.ttft == pytest.approx(0.5 + 2.0 + computing + TRANSFER.exposed(992, computing) + step)
    assert got.tpot == pytest.approx(DECODE.batch(1, 1050))
    assert got.measured


def test_a_queue_shrinks_with_the_reports_age_until_the_report_is_stale() -> None:
    def ttft(age: float) -> float:
        busy = Load(cost=PREFILL, running=1, queue_seconds=10.0)
        return placed(Demand(100, 10), Fleet((prefill(load=busy, load_at=NOW - age),), (decode(),))).prediction.ttft

    assert ttft(2.0) == pytest.approx(ttft(0.0) - 2.0)
    assert ttft(STALE_SECONDS + 1) == pytest.approx(ttft(0.0))


def test_what_this_router_placed_since_the_report_makes_the_queue_longer() -> None:
    fleet = Fleet((prefill(unseen=Share().plus(2048)), prefill("q")), (decode(),))
    assert names(placed(Demand(1000, 10, Slo(ttft=10.0)), fleet)) == ("d", "q")


def test_a_request_that_a_report_missed_still_counts() -> None:
    # Placed before the report was made, and not arrived at the worker then.
    view = prefill(ours=Share().plus(2048).plus(2048), unseen=Share())
    assert view.unreported == Share(2, 4096, 2 * attended_pairs(2048))
    seen = prefill(load=Load(running=1, cost=PREFILL), ours=Share().plus(2048).plus(1024), unseen=Share())
    assert (seen.unreported.requests, seen.unreported.tokens, seen.requests) == (1, 1536, 2)


def test_cached_tokens_are_not_computed_again() -> None:
    load = Load(cost=PREFILL, transfer=replace(TRANSFER, bytes_per_second=1e9))
    fleet = Fleet((prefill(load=load), prefill("q", load)), (decode(),))
    warm = placed(Demand(4000, 10, cached={"q": 3968}), fleet)
    assert names(warm) == ("d", "q")
    assert warm.prediction.ttft < placed(Demand(4000, 10), fleet).prediction.ttft / 4


SLOWER = replace(PREFILL, fixed=0.03, token=3e-4, pair=3e-8)


def test_the_objective_comes_before_the_price_and_the_price_before_headroom() -> None:
    fleet = Fleet(
        (
            prefill("dear", price=8.0),
            prefill("cheap", Load(cost=SLOWER, transfer=TRANSFER), price=1.0),
        ),
        (decode(price=4.0),),
    )
    assert names(placed(Demand(2000, 10, Slo(ttft=5.0)), fleet)) == ("d", "cheap")
    assert names(placed(Demand(2000, 10, Slo(ttft=0.5)), fleet)) == ("d", "dear")
    # Nobody can: the one that misses by less.
    assert names(placed(Demand(2000, 10, Slo(ttft=0.01)), fleet)) == ("d", "dear")


def test_a_tight_pace_avoids_the_decode_with_much_context() -> None:
    full = Load(cost=DECODE, running=6, context_tokens=300_000)
    fleet = Fleet(decodes=(decode("full", full), decode("empty", replace(full, running=7, context_tokens=7000))))
    assert names(placed(Demand(20, 100, Slo(tpot=0.02)), fleet)) == ("empty", None)


def test_equal_workers_share_by_headroom() -> None:
    fleet = Fleet(decodes=(decode("a", Load(cost=DECODE, running=5)), decode("b", Load(cost=DECODE, running=1))))
    assert names(placed(Demand(20, 10, Slo(1.0, 1.0)), fleet)) == ("b", None)


def test_a_price_that_is_not_stated_counts_as_the_mean_of_its_role() -> None:
    fleet = Fleet((prefill("unstated"), prefill("dear", price=9.0), prefill("cheap", price=1.0)), (decode(),))
    assert names(placed(Demand(2000, 10), fleet)) == ("d", "cheap")


def test_a_worker_that_has_measured_nothing_counts_as_the_fastest_and_so_gets_to_measure() -> None:
    fleet = Fleet((prefill("known", placed=5), prefill("new", Load(transfer=TRANSFER))), (decode(),))
    outcome = placed(Demand(1000, 10, Slo(ttft=5.0)), fleet)
    assert names(outcome) == ("d", "new")


# Fits of equal workers to steps of one request each: either may put everything into what the other leaves at 0.
BY_TOKEN = replace(DECODE, token=8e-4, context=0.0, measurements=900)
BY_CONTEXT = replace(DECODE, fixed=0.0, token=0.0, context=3e-5, measurements=30)


@pytest.mark.parametrize("used", ["a", "b"])
def test_workers_of_one_kind_take_turns_although_they_measured_differently(used: str) -> None:
    views = (decode("a", Load(cost=BY_TOKEN)), decode("b", Load(cost=BY_CONTEXT)))
    fleet = Fleet(decodes=tuple(replace(view, placed=int(view.info.instance == used)) for view in views))
    assert names(placed(Demand(400, 30, Slo(100.0, 1.0)), fleet)) == ("b" if used == "a" else "a", None)


def test_of_one_kind_the_slower_is_still_told_by_its_times() -> None:
    throttled = Load(cost=replace(SLOWER, measurements=100), transfer=TRANSFER)
    steady = Load(cost=replace(PREFILL, measurements=100), transfer=TRANSFER)
    fleet = Fleet((prefill("slow", throttled), prefill("steady", steady, placed=9)), (decode(),))
    assert names(placed(Demand(2000, 10, Slo(ttft=2.0)), fleet)) == ("d", "steady")
    assert names(placed(Demand(2000, 10, Slo(ttft=0.5)), fleet)) == ("d", "steady")


def test_a_worker_that_measured_little_counts_as_its_kind() -> None:
    # Its only measurement was made while everything started.
    once = Load(cost=replace(SLOWER, measurements=1), transfer=TRANSFER)
    often = Load(cost=replace(PREFILL, measurements=100), transfer=TRANSFER)
    fleet = Fleet((prefill("once", once), prefill("often", often, placed=9)), (decode(),))
    assert names(placed(Demand(2000, 10, Slo(ttft=2.0)), fleet)) == ("d", "once")
    # Of another kind, it is all that is known.
    fleet = Fleet((prefill("once", once, profile="other"), prefill("often", often, placed=9)), (decode(),))
    assert names(placed(Demand(2000, 10, Slo(ttft=2.0)), fleet)) == ("d", "often")


LOCAL_FLEET = Fleet(
    (prefill(load=Load(cost=PREFILL, transfer=replace(TRANSFER, handoff=0.05))),),
    (decode(load=Load(cost=replace(DECODE, token=3e-4))),),
)


@pytest.mark.parametrize(("prompt", "alone"), [(64, True), (250, True), (2000, False)])
def test_below_the_measured_crossover_decode_computes_the_prompt(prompt: int, alone: bool) -> None:
    outcome = placed(Demand(prompt, 10), LOCAL_FLEET, local_tokens=4096)
    assert (outcome.prefill is None, outcome.packed_tokens == 0) == (alone, alone)


def test_the_crossover_has_a_limit_and_needs_measurements() -> None:
    assert placed(Demand(250, 10), LOCAL_FLEET, local_tokens=128).prefill is not None
    assert placed(Demand(64, 10), Fleet((prefill(load=Load()),), (decode(load=Load()),)), local_tokens=4096).prefill


def test_a_prompt_stays_with_the_profile_that_computed_it_first() -> None:
    fleet = Fleet((prefill("f32", profile="f32"), prefill("bfp8", profile="bfp8", placed=3)), (decode(),))
    assert names(placed(Demand(1000, 10, profile="bfp8"), fleet)) == ("d", "bfp8")
    assert names(placed(Demand(1000, 10, profile="bfp8", avoid=frozenset({"bfp8"})), fleet)) == ("d", "f32")
    assert names(placed(Demand(1000, 10, profile=LOCAL), fleet)) == ("d", None)


def test_a_large_fleet_is_shortlisted_without_losing_the_best() -> None:
    prefills = [
        prefill(f"p{n:03}", Load(cost=PREFILL, transfer=TRANSFER, queue_seconds=1.0 + n, running=1)) for n in range(200)
    ]
    prefills[117] = prefill("best")
    decodes = [decode(f"d{n:03}", Load(cost=DECODE, running=4, context_tokens=9000)) for n in range(200)]
    decodes[61] = decode("idle")
    outcome = placed(Demand(1000, 10, Slo(1.0, 0.05)), Fleet(tuple(prefills), tuple(decodes)))
    assert names(outcome) == ("idle", "best")
