"""What work costs on a worker: the two models that workers publish and placement predicts with.

Both are linear in quantities that a router knows before it places a request. They are fitted by the worker to its own
latest measurements (`core.calibration`), so they hold for its device, its model, its arithmetic and whatever else slows
it, and nobody has to configure them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hma_serve.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step: a chunk of a prompt on prefill, a batch on decode.

    Attributes:
        fixed: Of every step: reading the weights, launching.
        token: Of each token computed.
        context: Of each token of context that a request with one token to compute reads.
        pair: Of each pair of a computed prompt token and a token that it attends to.
        step_tokens: Prompt tokens that one step computes at most; 0: any number.
        measurements: Steps that the fit knows; 0: it says nothing.
    """

    fixed: float = 0.0
    token: float = 0.0
    context: float = 0.0
    pair: float = 0.0
    step_tokens: int = 0
    measurements: int = 0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.measurements > 0

    def batch(self, requests: float, context_tokens: float) -> float:
        """Seconds of a step in which so many requests compute one token each."""
        return self.fixed + self.token * requests + self.context * context_tokens

    def prompt(self, tokens: int, before: int = 0) -> float:
        """Seconds of a prompt's tokens behind `before` computed ones, alone, in as many steps as they take."""
        if tokens <= 0:
            return 0.0
        return self.backlog(self.steps(tokens), tokens, attended_pairs(tokens, before))

    def backlog(self, steps: float, tokens: float, pairs: float) -> float:
        """Seconds of prompt work: so many steps with so many tokens and pairs altogether."""
        return self.fixed * steps + self.token * tokens + self.pair * pairs

    def steps(self, tokens: int, beside: int = 0) -> int:
        """Steps that a prompt takes when `beside` other tokens are part of each."""
        if not self.step_tokens:
            return 1
        return math.ceil(tokens / max(1, self.step_tokens - beside))

    @classmethod
    def mean(cls, costs: Sequence[StepCost]) -> StepCost:
        """What workers measured together: each coefficient's mean, the measurements counting; of at least one."""
        total = sum(cost.measurements for cost in costs)

        def mean(coefficient: Callable[[StepCost], float]) -> float:
            return sum(coefficient(cost) * cost.measurements for cost in costs) / total

        return cls(
            fixed=mean(lambda cost: cost.fixed),
            token=mean(lambda cost: cost.token),
            context=mean(lambda cost: cost.context),
            pair=mean(lambda cost: cost.pair),
            step_tokens=costs[0].step_tokens,
            measurements=total,
        )

    @classmethod
    def from_proto(cls, message: worker_pb2.CostModel) -> StepCost:
        """The dataclass of a message."""
        return cls(
            fixed=message.fixed_seconds,
            token=message.token_seconds,
            context=message.context_seconds,
            pair=message.pair_seconds,
            step_tokens=message.step_tokens,
            measurements=message.measurements,
        )

    def to_proto(self) -> worker_pb2.CostModel:
        """The message of this value."""
        return worker_pb2.CostModel(
            fixed_seconds=self.fixed,
            token_seconds=self.token,
            context_seconds=self.context,
            pair_seconds=self.pair,
            step_tokens=self.step_tokens,
            measurements=self.measurements,
        )


@dataclass(frozen=True, slots=True)
class TransferCost:
    """What a prompt's KV costs on its way from prefill to decode.

    Attributes:
        bytes_per_token: Of all layers, K and V, as the codec packs them.
        bytes_per_second: What a transfer reaches while it has something to send; 0: not measured.
        handoff: Seconds from the last layer's computation to decode's commit when nothing else is left to send.
        layers: Pieces that a chunk is sent in; all but the last travel while later ones are computed.
    """

    bytes_per_token: int = 0
    bytes_per_second: float = 0.0
    handoff: float = 0.0
    layers: int = 0

    def exposed(self, tokens: int, compute_seconds: float) -> float:
        """Seconds of a transfer that a computation of so many seconds does not hide."""
        return self.handoff + self.unhidden(tokens, compute_seconds)

    def unhidden(self, tokens: int, compute_seconds: float) -> float:
        """The part of it that the rate alone explains: the last layer, or all that compute did not cover."""
        if not self.bytes_per_second:
            return 0.0
        seconds = tokens * self.bytes_per_token / self.bytes_per_second
        return max(seconds / max(1, self.layers), seconds - compute_seconds)

    @classmethod
    def from_proto(cls, message: worker_pb2.TransferModel) -> TransferCost:
        """The dataclass of a message."""
        return cls(message.bytes_per_token, message.bytes_per_second, message.handoff_seconds, message.layers)

    def to_proto(self) -> worker_pb2.TransferModel:
        """The message of this value."""
        return worker_pb2.TransferModel(
            bytes_per_token=self.bytes_per_token,
            bytes_per_second=self.bytes_per_second,
            handoff_seconds=self.handoff,
            layers=self.layers,
        )


def attended_pairs(tokens: float, before: float = 0.0) -> float:
    """Pairs of a token and one that it attends to, for `tokens` tokens behind `before` others."""
    return tokens * (before + tokens / 2)
