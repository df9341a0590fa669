"""The reference accelerator: emulates any profile on the CPU, bit for bit what the profile's definition says.

Weights are rounded to the profile's format once, when they are read, and kept as ordinary floats; activations are
rounded at each call. Products of two BFP8 values are exact in float32, so multiplying the rounded floats is the
profile's arithmetic with float32 accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hma_serve import quant
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import Linear, LinearFactory, LinearSite, Transformer, open_weights
from hma_serve.prefill.accelerators import AcceleratorSpec, Completion, KvStore, Segment
from hma_serve.prefill.attention import StoredAttention
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.profiles import Profile

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class HostKv:
    """One request's packed KV in host memory: both what is sent and what attention reads.

    Per role one uint8 tensor [layers, heads, groups, group bytes]; nothing is kept decoded.
    """

    def __init__(self, layout: KvLayout, codecs: Sequence[quant.TorchCodec], tokens: int) -> None:
        groups = tokens // GROUP_TOKENS
        self._codecs: dict[int, quant.TorchCodec] = dict(zip(ROLES, codecs, strict=True))
        self._packed: dict[int, torch.Tensor] = {
            role: torch.empty((layout.layers, layout.heads, groups, size), dtype=torch.uint8)
            for role, size in zip(ROLES, layout.group_bytes, strict=True)
        }

    def append(self, layer: int, role: int, start: int, values: torch.Tensor) -> None:
        """Packs values [tokens, heads, D] of the tokens from `start` on."""
        packed = self._codecs[role].encode(values.transpose(0, 1).contiguous())
        first = start // GROUP_TOKENS
        self._packed[role][layer, :, first : first + packed.shape[1]] = packed

    def read(self, layer: int, role: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `tokens` tokens as stored, decoded: [tokens, heads, D], contiguous."""
        packed = self._packed[role][layer, :, : tokens // GROUP_TOKENS]
        return self._codecs[role].decode(packed, dtype=dtype).transpose(0, 1).contiguous()

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> None:
        """See `KvStore`."""
        np.copyto(out, self._packed[role][layer, heads, groups].numpy())

    def copy_in(self, layer: int, role: int, heads: slice, groups: slice, packed: NDArray[np.uint8]) -> None:
        """See `KvStore`."""
        np.copyto(self._packed[role][layer, heads, groups].numpy(), packed)


class CpuAccelerator:
    """See `hma_serve.prefill.accelerators.Accelerator`."""

    device = "cpu"

    def __init__(self, spec: AcceleratorSpec) -> None:
        profile, model = spec.profile, spec.model
        self._layout = KvLayout.of(model, profile)
        self._codecs = (quant.codec(profile.k_codec), quant.codec(profile.v_codec))
        dtype = _DTYPES[profile.compute]
        opened = open_weights(spec.checkpoint, model, dtype=dtype, with_head=False, progress=spec.progress)
        with opened as weights:
            self._model = Transformer(model, weights, linear=linear_factory(profile))

    @property
    def model(self) -> ModelConfig:
        """The model it holds."""
        return self._model.config

    def pin(self, memory: memoryview) -> None:
        """See `Accelerator`: host memory is its own."""

    def fence(self) -> Completion | None:
        """See `Accelerator`: nothing is left under way."""
        return None

    def new_store(self, tokens: int) -> KvStore:
        """See `Accelerator`."""
        return HostKv(self._layout, self._codecs, tokens)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Accelerator`."""
        return self._model.embed(torch.tensor(token_ids, dtype=torch.int64))

    @torch.inference_mode()
    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """See `Accelerator`."""
        positions = torch.cat([torch.arange(part.start, part.start + part.tokens) for part in segments])
        return self._model.layer(layer, hidden, positions, StoredAttention([_attended(part) for part in segments]))


def _attended(part: Segment) -> tuple[int, int, HostKv]:
    if not isinstance(part.store, HostKv):
        raise TypeError(f"{type(part.store).__name__} was not made by this accelerator")
    return part.start, part.tokens, part.store


_Rounding = Callable[[torch.Tensor], torch.Tensor]


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def linear_factory(profile: Profile) -> LinearFactory:
    """Linear layers in the profile's formats; float formats are the dtype that the weights were read in."""
    round_activations: _Rounding = quant.fake_quantize_bfp8 if profile.activations == "tt_bfp8" else _unchanged

    def make(weight: torch.Tensor, site: LinearSite) -> Linear:
        # Axis 0: ttnn stores a weight as [in, out], so its groups run along the output features. Stacked matrices keep
        # their own groups, because every part is a multiple of the group (`Profile.check`).
        rounded = quant.fake_quantize_bfp8(weight, axis=0) if profile.weights == "tt_bfp8" else weight

        def multiply(x: torch.Tensor) -> torch.Tensor:
            return functional.linear(round_activations(x), rounded)

        return multiply

    return make
