"""Times one completion's tokens and compares them with what was promised and predicted.

What fails has missed every objective that it had; or else a router that sheds all that comes would seem to serve
everyone in time.
"""

from __future__ import annotations

import asyncio

from hma_serve.core.request import Slo
from hma_serve.router.prediction import Prediction
from hma_serve.telemetry.metrics import RouterMetrics


class Pace:
    """One completion's.

    Args:
        metrics: The router's.
        slo: The completion's objectives.
        arrived: When it came, seconds of the loop's clock.
    """

    def __init__(self, metrics: RouterMetrics, slo: Slo, arrived: float) -> None:
        self._metrics = metrics
        self._slo = slo
        self._arrived = arrived
        self._prediction: Prediction | None = None
        self._tokens = 0
        self._first = 0.0
        self._last = 0.0
        self._ttft = 0.0
        self._finished = False

    def placed(self, prediction: Prediction) -> None:
        """It begins; what is predicted of a later attempt is of no interest."""
        if self._prediction is None:
            self._prediction = prediction

    def note(self, tokens: int) -> None:
        """More tokens came."""
        if not tokens:
            return
        self._last = asyncio.get_running_loop().time()
        if not self._tokens:
            self._first, self._ttft = self._last, self._last - self._arrived
            self._metrics.time_to_first_token_seconds.observe(self._ttft)
        self._tokens += tokens
        self._metrics.generated_tokens.inc(tokens)

    def finish(self) -> None:
        """The completion ended."""
        self._finished = True
        if not self._tokens:
            return
        tpot = (self._last - self._first) / (self._tokens - 1) if self._tokens > 1 else None
        if tpot is not None:
            self._metrics.time_per_output_token_seconds.observe(tpot)
        predicted = self._prediction or Prediction()
        self._compare("ttft", self._ttft, self._slo.ttft, predicted.ttft)
        self._compare("tpot", tpot, self._slo.tpot, predicted.tpot)
        met = self._ttft <= (self._slo.ttft or self._ttft) and (tpot or 0.0) <= (self._slo.tpot or tpot or 0.0)
        self._metrics.slo.labels("all", "attained" if met else "missed").inc()

    def fail(self) -> None:
        """Its request failed or was shed, by no fault of the client's; a completion that ended before stands."""
        if self._finished:
            return
        self._finished = True
        for objective, aim in (("ttft", self._slo.ttft), ("tpot", self._slo.tpot)):
            if aim is not None:
                self._metrics.slo.labels(objective, "missed").inc()
        self._metrics.slo.labels("all", "missed").inc()

    def _compare(self, objective: str, took: float | None, aim: float | None, predicted: float) -> None:
        if took is None:
            return
        if aim is not None:
            self._metrics.slo.labels(objective, "attained" if took <= aim else "missed").inc()
        if self._prediction is not None and self._prediction.measured:
            self._metrics.predicted_seconds.labels(objective).observe(predicted)
            self._metrics.prediction_ratio.labels(objective).observe(took / max(predicted, 1e-9))
