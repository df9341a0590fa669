"""One rank's share of a model under tensor parallelism: whole heads, and a slice of the MLP's inner features.

Weights that make heads or inner features are cut by their outputs, those that read them by their inputs, so a layer
needs two sums over the ranks. Whatever is rounded is rounded before it is cut, and a row that is spread over ranks gets
the scale of the whole row, so a profile means the same for any number of ranks; only the order of summation differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hma_serve.core.model_config import ModelConfig

Reduce = Callable[[torch.Tensor], torch.Tensor]


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True, slots=True)
class Shard:
    """Which share, and how the ranks put theirs together.

    Attributes:
        rank: From 0.
        count: Ranks.
        sum: Adds up a tensor over the ranks, the same bits on each and for any cut of its rows.
        largest: Element-wise maximum over the ranks.
    """

    rank: int = 0
    count: int = 1
    sum: Reduce = _alone
    largest: Reduce = _alone

    def outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """The rank's rows of [out, ...]."""
        return weight.chunk(self.count, dim=0)[self.rank]

    def inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """The rank's columns of [out, in]."""
        return weight.chunk(self.count, dim=1)[self.rank]

    def heads(self, total: int) -> slice:
        """The rank's heads out of `total`."""
        each = total // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def local(self, model: ModelConfig) -> ModelConfig:
        """The sizes that the rank sees."""
        return dataclasses.replace(
            model,
            num_heads=model.num_heads // self.count,
            num_kv_heads=model.num_kv_heads // self.count,
            intermediate_size=model.intermediate_size // self.count,
        )


WHOLE = Shard()
"""One rank that holds everything."""
