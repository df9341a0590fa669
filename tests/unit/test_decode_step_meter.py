"""The engine's own steps become a model of any step."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hma_serve.decode.scheduler import Share
from hma_serve.decode.step_meter import StepMeter, Work


def share(computed: int, count: int = 1) -> Share:
    return Share(cast(Any, None), computed, count, samples=True, carried=None)


def test_work_tells_single_tokens_from_prompts() -> None:
    assert Work.of([share(99), share(199), share(64, 32)]) == Work(34, 300, 32 * (64 + 16))


def test_steps_are_counted_averaged_and_fitted() -> None:
    meter = StepMeter(256)
    for batch in (1, 2, 4, 8) * 20:
        shares = [share(100 * batch)] * batch
        work = Work.of(shares)
        meter.note(work, 0.01 + 0.001 * work.tokens + 1e-6 * work.context_tokens)
    assert meter.steps == 80
    assert 0.01 < meter.mean_seconds < 0.03
    cost = meter.cost
    assert cost.measurements == 79
    assert cost.step_tokens == 256
    assert cost.fixed_seconds + 8 * cost.token_seconds + 6400 * cost.context_seconds == pytest.approx(0.0244, rel=0.02)
