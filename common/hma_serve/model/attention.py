"""The seam between the transformer and whoever owns the KV cache, and the plain attention that everything is tested by.

The transformer never sees a cache. It computes the queries, keys and values of the tokens in hand and asks an injected
`Attention` for the result; storing, quantising, paging and merging are that object's business.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


class Attention(Protocol):
    """Attends the tokens of one forward pass to everything they may see, themselves included."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        """Computes one layer's attention.

        Args:
            layer: Index of the decoder layer.
            q: Queries `[T, num_heads, head_dim]`, after norm and rotation.
            k: Keys `[T, num_kv_heads, head_dim]`, after norm and rotation.
            v: Values `[T, num_kv_heads, head_dim]`.

        Returns:
            `[T, num_heads, head_dim]` in q's dtype.
        """
        ...


class CausalAttention:
    """Dense causal attention over one sequence, with an unquantised cache: the reference.

    Calls for one layer must come in the order of the sequence; each appends its keys and values and attends to all that
    came before. Whole prompts, chunks and single tokens are all calls of the same kind.
    """

    def __init__(self, num_layers: int) -> None:
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        """See `Attention`."""
        keys = self._keys[layer] = _extended(self._keys[layer], k)
        values = self._values[layer] = _extended(self._values[layer], v)
        new, total = q.shape[0], keys.shape[0]
        visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


def _extended(cache: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if cache is None else torch.cat((cache, new))
