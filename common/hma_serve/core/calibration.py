"""Fits cost models to what was measured, while it is measured.

Exponentially forgetting least squares with coefficients that are never negative: a cost that falls with more work
would let a router believe that a long prompt is free. The sums that the fit needs are a few numbers, so nothing is
stored, and solving happens only when somebody asks.

Each measurement is weighted by the inverse square of what the model expected, so that short steps and long ones count
alike; weighting by the measurement itself would favour the steps that happened to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hma_serve.core.cost_model import StepCost, TransferCost, attended_pairs

# Steps at the start that warm caches and compile; they say nothing of later ones.
_WARM_UP = 1
# A single step that takes so many times what was expected was interrupted; it must not bend the model.
_OUTLIER = 4.0
# Measurements after which the fit says what to expect, and after which it is asked again: solving takes 0.2 ms.
_EXPECT_EVERY = 16
_RIDGE = 1e-6
_TINY = 1e-9
_TRANSFER_SMOOTHING = 0.1


class LinearFit:
    """`y = sum(coefficient * x)` with coefficients of at least 0.

    Args:
        features: How many there are.
        memory: Measurements that count; older ones fade out.
    """

    def __init__(self, features: int, *, memory: float) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._xx = [[0.0] * features for _ in range(features)]
        self._xy = [0.0] * features
        self._coefficients: tuple[float, ...] | None = None

    def add(self, x: Sequence[float], y: float, weight: float) -> None:
        """One more measurement."""
        for i, xi in enumerate(x):
            row = self._xx[i]
            for j, xj in enumerate(x):
                row[j] = row[j] * self._keep + weight * xi * xj
            self._xy[i] = self._xy[i] * self._keep + weight * xi * y
        self._coefficients = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The best ones: of all subsets of features that give no negative coefficient, the closest fit.

        There are at most a handful of features, so trying every subset is exact and takes microseconds.
        """
        if self._coefficients is None:
            count = len(self._xy)
            best, least = (0.0,) * count, 0.0
            for size in range(1, count + 1):
                for chosen in combinations(range(count), size):
                    solved = self._solve(chosen)
                    if solved is None or min(solved) < 0:
                        continue
                    # The squared error up to a constant, at the minimum of the chosen subset.
                    error = -sum(value * self._xy[i] for i, value in zip(chosen, solved, strict=True))
                    if error < least - _TINY * abs(least):
                        values = dict(zip(chosen, solved, strict=True))
                        best, least = tuple(values.get(i, 0.0) for i in range(count)), error
            self._coefficients = best
        return self._coefficients

    def _solve(self, chosen: Sequence[int]) -> list[float] | None:
        """The normal equations of some features, scaled to unit diagonal; None where a feature never occurred."""
        scales = [self._xx[i][i] ** 0.5 for i in chosen]
        if min(scales) <= 0.0:
            return None
        rows = [
            [self._xx[i][j] / (si * sj) + (_RIDGE if i == j else 0.0) for j, sj in zip(chosen, scales, strict=True)]
            + [self._xy[i] / si]
            for i, si in zip(chosen, scales, strict=True)
        ]
        solved = _gauss(rows)
        return [value / scale for value, scale in zip(solved, scales, strict=True)]


def _gauss(rows: list[list[float]]) -> list[float]:
    """Solves a symmetric positive definite system given as augmented rows."""
    count = len(rows)
    for pivot in range(count):
        for row in range(pivot + 1, count):
            factor = rows[row][pivot] / rows[pivot][pivot]
            for column in range(pivot, count + 1):
                rows[row][column] -= factor * rows[pivot][column]
    solution = [0.0] * count
    for row in reversed(range(count)):
        known = sum(rows[row][column] * solution[column] for column in range(row + 1, count))
        solution[row] = (rows[row][count] - known) / rows[row][row]
    return solution


class StepCalibration:
    """Keeps a worker's `StepCost` true to its steps.

    Args:
        step_tokens: Prompt tokens that one step computes at most.
        memory: Steps that count.
    """

    def __init__(self, step_tokens: int, *, memory: float = 500.0) -> None:
        self._step_tokens = step_tokens
        self._fit = LinearFit(4, memory=memory)
        self._seen = 0
        self._expected: tuple[float, ...] | None = None

    @property
    def measurements(self) -> int:
        """Steps that the fit knows."""
        return max(0, self._seen - _WARM_UP)

    @property
    def cost(self) -> StepCost:
        """The model now."""
        fixed, token, context, pair = self._fit.coefficients
        return StepCost(fixed, token, context, pair, self._step_tokens, self.measurements)

    def note_chunk(self, tokens: int, before: int, seconds: float) -> None:
        """A chunk of one prompt took so long."""
        self._note((1.0, tokens, 0.0, attended_pairs(tokens, before)), seconds)

    def note_batch(self, tokens: int, context_tokens: float, pairs: float, seconds: float) -> None:
        """A step took so long.

        Args:
            tokens: Computed by it, of prompts and of answers.
            context_tokens: Read by requests that computed one token.
            pairs: Of prompt tokens computed and tokens that they attend to.
            seconds: What it took.
        """
        self._note((1.0, tokens, context_tokens, pairs), seconds)

    def _note(self, x: tuple[float, ...], seconds: float) -> None:
        self._seen += 1
        if self._seen <= _WARM_UP:
            return
        expected = seconds
        if self._expected is not None:
            expected = sum(c * xi for c, xi in zip(self._expected, x, strict=True)) or seconds
            seconds = min(seconds, _OUTLIER * expected)
        self._fit.add(x, seconds, 1.0 / max(expected, _TINY) ** 2)
        if self.measurements % _EXPECT_EVERY == 0:
            self._expected = self._fit.coefficients


@dataclass(slots=True)
class TransferCalibration:
    """Keeps a prefill worker's `TransferCost` true to its transfers.

    Attributes:
        bytes_per_token: Known from the codec.
        layers: Of the model.
    """

    bytes_per_token: int
    layers: int
    _bytes: float = 0.0
    _seconds: float = 0.0
    _handoff: float | None = None

    @property
    def cost(self) -> TransferCost:
        """The model now."""
        rate = self._bytes / self._seconds if self._seconds > 0 else 0.0
        return TransferCost(self.bytes_per_token, rate, self._handoff or 0.0, self.layers)

    def note(self, tokens: int, sent_bytes: int, sending: float, computing: float, exposed: float) -> None:
        """A transfer is over.

        Args:
            tokens: Whose KV was sent.
            sent_bytes: Payload.
            sending: Seconds in which there was something to send.
            computing: Seconds of computation that it ran beside.
            exposed: Seconds from the end of the computation to decode's commit.
        """
        keep = 1.0 - _TRANSFER_SMOOTHING
        self._bytes = self._bytes * keep + sent_bytes
        self._seconds = self._seconds * keep + sending
        handoff = max(0.0, exposed - self.cost.unhidden(tokens, computing))
        known = self._handoff
        self._handoff = handoff if known is None else known + (handoff - known) * _TRANSFER_SMOOTHING
