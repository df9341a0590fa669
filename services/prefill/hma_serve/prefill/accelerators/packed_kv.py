"""One request's packed KV as tensors on any torch device: what is sent, and what attention reads.

Packed bytes are the truth. Attention needs them decoded, and a chunk needs the whole prefix, so decoded values are kept
beside them where a budget allows it: then each group of tokens is decoded once, not once for every later chunk. Without
room the prefix is decoded anew for each layer; the values are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve import quant
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.prefill.accelerators import AcceleratorSpec, Completion
from hma_serve.prefill.decoded_budget import DecodedBudget
from hma_serve.prefill.kv_layout import ROLES, KvLayout


class TensorKv:
    """See `hma_serve.prefill.accelerators.KvStore` and `hma_serve.prefill.attention.PackedKv`.

    Args:
        layout: Of the packed KV.
        codecs: Of keys and of values.
        tokens: How many it holds, whole groups.
        head_dim: Channels of a head.
        dtype: Of decoded values, float32 or bfloat16.
        device: Where it lies.
        budget: For decoded copies.
    """

    def __init__(
        self,
        layout: KvLayout,
        codecs: Sequence[quant.TorchCodec],
        tokens: int,
        *,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        budget: DecodedBudget | None = None,
    ) -> None:
        groups = tokens // GROUP_TOKENS
        self._codecs: dict[int, quant.TorchCodec] = dict(zip(ROLES, codecs, strict=True))
        self._packed: dict[int, torch.Tensor] = {
            role: torch.empty((layout.layers, layout.heads, groups, size), dtype=torch.uint8, device=device)
            for role, size in zip(ROLES, layout.group_bytes, strict=True)
        }
        self._dtype = dtype
        self._decoded: dict[int, torch.Tensor] = {}
        self._known: dict[tuple[int, int], int] = {}
        shape = (layout.layers, tokens, layout.heads, head_dim)
        size = len(ROLES) * torch.Size(shape).numel() * dtype.itemsize
        if budget is not None and budget.take(size):
            weakref.finalize(self, budget.give, size)
            self._decoded = {role: torch.empty(shape, dtype=dtype, device=device) for role in ROLES}

    def append(self, layer: int, role: int, start: int, values: torch.Tensor) -> None:
        """Packs values [tokens, heads, D] of the tokens from `start` on."""
        packed = self._codecs[role].encode(values.transpose(0, 1).contiguous())
        first = start // GROUP_TOKENS
        self._packed[role][layer, :, first : first + packed.shape[1]] = packed

    def read(self, layer: int, role: int, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens as stored, decoded: [tokens, heads, D], contiguous."""
        if not self._decoded:
            return self._decode(layer, role, 0, tokens)
        known = self._known.get((layer, role), 0)
        decoded = self._decoded[role][layer]
        if known < tokens:
            decoded[known:tokens] = self._decode(layer, role, known, tokens)
            self._known[layer, role] = tokens
        return decoded[:tokens]

    def packed(self, layer: int, role: int) -> torch.Tensor:
        """A layer's packed bytes, uint8 [heads, groups, group bytes], contiguous; for kernels that write them."""
        return self._packed[role][layer]

    def writable(self, layer: int, role: int, start: int, stop: int) -> torch.Tensor:
        """Decoded values [at least `stop` tokens, heads, D], contiguous, valid up to `start`.

        For kernels that pack the tokens from `start` to `stop` and write what they decode to here.
        """
        if not self._decoded:
            first = self._decode(layer, role, 0, start)
            return torch.cat([first, first.new_empty((stop - start, *first.shape[1:]))])
        self.read(layer, role, start)
        self._known[layer, role] = stop
        return self._decoded[role][layer]

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> Completion | None:
        """See `KvStore`."""
        torch.from_numpy(out).copy_(self._packed[role][layer, heads, groups])
        return None

    def copy_in(self, layer: int, role: int, heads: slice, groups: slice, packed: NDArray[np.uint8]) -> None:
        """See `KvStore`."""
        self._packed[role][layer, heads, groups] = torch.from_numpy(packed).to(self._packed[role].device)
        known = self._known.get((layer, role), 0)
        self._known[layer, role] = min(known, (groups.start or 0) * GROUP_TOKENS)

    def _decode(self, layer: int, role: int, start: int, stop: int) -> torch.Tensor:
        packed = self._packed[role][layer, :, start // GROUP_TOKENS : stop // GROUP_TOKENS]
        return self._codecs[role].decode(packed, dtype=self._dtype).transpose(0, 1).contiguous()


def offset_tensor(spec: AcceleratorSpec) -> torch.Tensor | None:
    """What the keys of a rank's heads lose before they are packed, float32 [layers, heads, D]; None: nothing."""
    if not spec.k_offsets:
        return None
    model = spec.model
    whole = torch.from_numpy(spec.k_offsets.array(model.num_layers, model.num_kv_heads, model.head_dim))
    return whole[:, spec.shard.heads(model.num_kv_heads)].contiguous()
