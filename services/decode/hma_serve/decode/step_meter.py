"""What the engine's steps take, as routers want to know it: a running mean, and a model of any step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hma_serve.core.calibration import StepCalibration
from hma_serve.core.cost_model import attended_pairs
from hma_serve.decode.scheduler import Share
from hma_serve.v1 import worker_pb2

_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Work:
    """What one step computes.

    Attributes:
        tokens: Of answers and prompts.
        context_tokens: Read by the sequences that compute one token.
        pairs: Of tokens of longer shares and tokens that they attend to.
    """

    tokens: int
    context_tokens: int
    pairs: float

    @classmethod
    def of(cls, shares: Iterable[Share]) -> Work:
        """The work of a step."""
        tokens, context, pairs = 0, 0, 0.0
        for share in shares:
            tokens += share.count
            if share.count == 1:
                context += share.start + 1
            else:
                pairs += attended_pairs(share.count, share.start)
        return cls(tokens, context, pairs)


class StepMeter:
    """Takes the time of every step.

    Args:
        step_tokens: Prompt tokens that a step computes at most.
    """

    def __init__(self, step_tokens: int) -> None:
        self._calibration = StepCalibration(step_tokens)
        self.steps = 0
        self.mean_seconds = 0.0

    def note(self, work: Work, seconds: float) -> None:
        """One step is over."""
        self.steps += 1
        self.mean_seconds += (seconds - self.mean_seconds) * (_SMOOTHING if self.mean_seconds else 1.0)
        self._calibration.note_batch(work.tokens, work.context_tokens, work.pairs, seconds)

    @property
    def cost(self) -> worker_pb2.CostModel:
        """The model now."""
        return self._calibration.cost.to_proto()
