"""Outcomes are compared with objectives and predictions."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from hma_serve.core.request import Slo
from hma_serve.router.pace import Pace
from hma_serve.router.prediction import Prediction
from hma_serve.telemetry.metrics import router_metrics
from support.virtual_loop import virtual


@virtual
async def test_what_was_attained_and_predicted_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = router_metrics(registry)
    for ttft, gap in ((0.5, 0.125), (2.0, 0.125)):
        pace = Pace(metrics, Slo(ttft=1.0, tpot=0.25), asyncio.get_running_loop().time())
        pace.placed(Prediction(ttft=0.5, tpot=0.125, measured=True))
        pace.placed(Prediction(ttft=99.0, tpot=99.0, measured=True))
        await asyncio.sleep(ttft)
        pace.note(1)
        for _ in range(4):
            await asyncio.sleep(gap)
            pace.note(1)
        pace.finish()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"hma_router_{name}", labels)

    assert value("slo_total", objective="ttft", outcome="attained") == 1
    assert value("slo_total", objective="ttft", outcome="missed") == 1
    assert value("slo_total", objective="tpot", outcome="attained") == 2
    assert value("slo_total", objective="all", outcome="attained") == 1
    assert value("prediction_ratio_sum", objective="ttft") == 5.0
    assert value("prediction_ratio_sum", objective="tpot") == 2.0
    assert value("predicted_seconds_sum", objective="ttft") == 1.0


@virtual
async def test_a_failure_counts_for_what_had_not_ended() -> None:
    registry = CollectorRegistry()
    metrics = router_metrics(registry)
    done, begun = (Pace(metrics, Slo(ttft=1.0), asyncio.get_running_loop().time()) for _ in range(2))
    for pace in (done, begun):
        pace.note(1)
    done.finish()
    done.fail()
    begun.fail()
    for objective in ("ttft", "all"):
        for outcome in ("attained", "missed"):
            assert registry.get_sample_value("hma_router_slo_total", {"objective": objective, "outcome": outcome}) == 1
    assert registry.get_sample_value("hma_router_slo_total", {"objective": "tpot", "outcome": "missed"}) is None


@virtual
async def test_without_objectives_or_measurements_nothing_is_compared() -> None:
    registry = CollectorRegistry()
    pace = Pace(router_metrics(registry), Slo(), asyncio.get_running_loop().time())
    pace.placed(Prediction())
    pace.note(2)
    pace.finish()
    assert registry.get_sample_value("hma_router_slo_total", {"objective": "ttft", "outcome": "attained"}) is None
    assert registry.get_sample_value("hma_router_prediction_ratio_count", {"objective": "ttft"}) is None
