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

from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.model_config import ModelConfig
from hma_serve.prefill.profiles import OPERAND_GROUPS, Profile

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


def check_ranks(model: ModelConfig, profile: Profile, ranks: int) -> None:
    """Refuses a number of ranks among which the model cannot be dealt out.

    Raises:
        FailedPrecondition: Names the size at fault.
    """
    if ranks > model.num_kv_heads:
        raise FailedPrecondition(
            f"--tp {ranks} asks for more ranks than this model has key/value heads ({model.num_kv_heads}); "
            "every rank needs at least one",
            field="--tp",
        )
    sizes = {"num_key_value_heads": model.num_kv_heads, "num_attention_heads": model.num_heads}
    for name, size in (sizes | {"intermediate_size": model.intermediate_size}).items():
        if size % ranks:
            raise FailedPrecondition(f"{name} is {size}, which {ranks} ranks cannot share evenly", field="--tp")
    group = OPERAND_GROUPS[profile.activations]
    for name, size in (
        ("num_attention_heads x head_dim", model.q_size),
        ("intermediate_size", model.intermediate_size),
    ):
        if size // ranks % group:
            raise FailedPrecondition(
                f"{name} over {ranks} ranks is {size // ranks}, not a multiple of {group}, "
                f"the group of {profile.activations}",
                field="--tp",
            )
