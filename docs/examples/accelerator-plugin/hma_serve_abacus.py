"""An accelerator in a package of its own. The device is imaginary: torch on the host stands in for it.

Everything that a vendor has to write is here: refuse what the device cannot do, put the weights on it in its format,
and run a layer that leaves packed keys and values behind. `TensorKv` serves any device whose memory torch can address;
another one brings a `KvStore` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from hma_serve import quant
from hma_serve.core.errors import FailedPrecondition
from hma_serve.model import Linear, LinearSite, Transformer, open_weights
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, Completion, KvStore, Segment
from hma_serve.prefill.accelerators.packed_kv import TensorKv
from hma_serve.prefill.kv_layout import ROLES, KvLayout


def open_abacus(spec: AcceleratorSpec) -> Accelerator:
    """The factory that the entry point names."""
    profile = spec.profile
    if (profile.weights, profile.activations, profile.compute) != ("int8", "int8", "bf16"):
        raise FailedPrecondition(f"an Abacus counts in int8; profile {profile.name} does not", field="--profile")
    if spec.shard.count > 1:
        raise FailedPrecondition("there is one Abacus to a host", field="--tp")
    if spec.k_offsets:
        raise FailedPrecondition("an Abacus cannot subtract K offsets", field="--k-offsets")
    return Abacus(spec)


class Abacus:
    """See `hma_serve.prefill.accelerators.Accelerator`."""

    device = "Abacus Mk. II"
    kv_tokens = None  # a device with memory of its own says what is left of it

    def __init__(self, spec: AcceleratorSpec) -> None:
        self._config, self._layout = spec.model, KvLayout.of(spec.model, spec.profile)
        self._codecs = quant.codec(spec.profile.k_codec), quant.codec(spec.profile.v_codec)
        with open_weights(
            spec.checkpoint, spec.model, dtype=torch.bfloat16, with_head=False, progress=spec.progress
        ) as weights:
            self._model = Transformer(spec.model, weights, linear=_int8_linear)

    def pin(self, memory: memoryview) -> None:
        """A device that copies by DMA registers the memory here."""

    def fence(self) -> Completion | None:
        """None: a layer is computed when `run_layer` returns. A device with a queue records an event."""
        return None

    def new_store(self, tokens: int) -> KvStore:
        """Memory for one request."""
        return TensorKv(self._layout, self._codecs, tokens, head_dim=self._config.head_dim, dtype=torch.bfloat16)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What enters layer 0."""
        return self._model.embed(torch.tensor(token_ids))

    @torch.inference_mode()
    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """One layer; its keys and values lie packed in the segments' stores afterwards."""
        positions = torch.cat([torch.arange(part.start, part.start + part.tokens) for part in segments])

        def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
            rows = [part.tokens for part in segments]
            parts = zip(segments, *(torch.split(x, rows) for x in (q, k, v)), strict=True)
            return torch.cat([_attend(layer, *part) for part in parts])

        return self._model.layer(layer, hidden, positions, attention)


def _int8_linear(weight: torch.Tensor, site: LinearSite) -> Linear:
    """A weight [out, in] as the device holds it; called once for each. `site` says where in the model it belongs."""
    int8 = quant.operand_format("int8")
    held = int8.quantize_weight(weight)
    return lambda x: quant.multiply(int8.quantize(x), held, x.dtype)


def _attend(layer: int, part: Segment, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Packs a segment's keys and values, and attends to what was packed, as decode will."""
    store, end = part.store, part.start + part.tokens
    assert isinstance(store, TensorKv)
    for role, fresh in zip(ROLES, (k, v), strict=True):
        store.append(layer, role, part.start, fresh)
    keys, values = (store.read(layer, role, end) for role in ROLES)
    # One group of 32 queries at a time: a row's sum must not depend on how many rows are in the chunk.
    out = []
    for row in range(0, part.tokens, 32):
        seen = part.start + row + 32
        group, k, v = (x.transpose(0, 1)[None] for x in (q[row : row + 32], keys[:seen], values[:seen]))
        mask = torch.ones(32, seen, dtype=torch.bool).tril(seen - 32)
        out.append(functional.scaled_dot_product_attention(group, k, v, attn_mask=mask, enable_gqa=True)[0])
    return torch.cat(out, dim=1).transpose(0, 1)
