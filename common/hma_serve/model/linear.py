"""The seam at which prefill quantises and decode does not: who multiplies by a weight, and how.

The transformer hands every weight matrix to an injected factory exactly once, while it is being built, and keeps only
the callable it gets back. A factory may therefore repack or quantise the weight and let the original go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

Linear = Callable[[torch.Tensor], torch.Tensor]
"""Maps `x [T, in]` to `[T, out]`, computing `x @ weight.T`."""


@dataclass(frozen=True, slots=True)
class LinearSite:
    """Where in the model a weight belongs.

    Attributes:
        name: `qkv_proj`, `o_proj`, `gate_up_proj`, `down_proj` or `lm_head`.
        layer: Index of the decoder layer; None for the head.
        parts: Output sizes of the matrices that were stacked into this one, in order: (q, k, v), (gate, up), or the
            single size. Their sum is the weight's first dimension.
    """

    name: str
    layer: int | None
    parts: tuple[int, ...]


LinearFactory = Callable[[torch.Tensor, LinearSite], Linear]
"""Takes `weight [out, in]` and its site; called once per weight when the model is built."""


def dense_linear(weight: torch.Tensor, site: LinearSite) -> Linear:
    """The plain product in the weight's own dtype: what decode uses, and the reference for everything else.

    Args:
        weight: `[out, in]`.
        site: Not needed here; every weight is treated alike.

    Returns:
        A callable that maps `[T, in]` to `[T, out]`.
    """

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    return multiply
