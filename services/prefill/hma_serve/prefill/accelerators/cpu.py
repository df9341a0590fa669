"""The reference accelerator: emulates any profile on the CPU, bit for bit what the profile's definition says.

Weights are rounded to the profile's format once, when they are read; activations are rounded at each call; K and V are
packed by the profile's codecs and attended to as packed. The formats and their product are `hma_serve.quant`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from hma_serve import quant
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import LazyWeights, Linear, LinearFactory, LinearSite, Transformer, open_weights
from hma_serve.prefill.accelerators import AcceleratorSpec, Completion, KvStore, Segment
from hma_serve.prefill.accelerators.packed_kv import TensorKv, offset_tensor
from hma_serve.prefill.accelerators.sharding import WHOLE, Shard
from hma_serve.prefill.attention import StoredAttention
from hma_serve.prefill.decoded_budget import HOST_DECODED_BYTES, DecodedBudget
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.profiles import Profile

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class CpuAccelerator:
    """See `hma_serve.prefill.accelerators.Accelerator`.

    Args:
        spec: What to load.
        weights: Whole tensors by name, in the profile's dtype; None: the checkpoint's.
    """

    device = "cpu"
    kv_tokens = None

    def __init__(self, spec: AcceleratorSpec, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        profile, model = spec.profile, spec.shard.local(spec.model)
        self._layout = KvLayout.of(model, profile)
        self._codecs = (quant.codec(profile.k_codec), quant.codec(profile.v_codec))
        self._k_offsets = offset_tensor(spec)
        self._budget = DecodedBudget(HOST_DECODED_BYTES if spec.decoded_bytes is None else spec.decoded_bytes)
        self._dtype = DTYPES[profile.compute]
        with contextlib.ExitStack() as stack:
            if weights is None:
                weights = stack.enter_context(_opened(spec, self._dtype))
            self._model = Transformer(model, weights, linear=linear_factory(profile, spec.shard))

    @property
    def model(self) -> ModelConfig:
        """The model it holds; of one that is cut, this rank's sizes."""
        return self._model.config

    def pin(self, memory: memoryview) -> None:
        """See `Accelerator`: host memory is its own."""

    def fence(self) -> Completion | None:
        """See `Accelerator`: nothing is left under way."""
        return None

    def new_store(self, tokens: int) -> KvStore:
        """See `Accelerator`."""
        return TensorKv(
            self._layout,
            self._codecs,
            tokens,
            head_dim=self.model.head_dim,
            dtype=self._dtype,
            budget=self._budget,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Accelerator`."""
        return self._model.embed(torch.tensor(token_ids, dtype=torch.int64))

    @torch.inference_mode()
    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """See `Accelerator`."""
        positions = torch.cat([torch.arange(part.start, part.start + part.tokens) for part in segments])
        attention = StoredAttention([_attended(part) for part in segments], self._k_offsets)
        return self._model.layer(layer, hidden, positions, attention)


def _opened(spec: AcceleratorSpec, dtype: torch.dtype) -> LazyWeights:
    return open_weights(spec.checkpoint, spec.model, dtype=dtype, with_head=False, progress=spec.progress)


def _attended(part: Segment) -> tuple[int, int, TensorKv]:
    if not isinstance(part.store, TensorKv):
        raise TypeError(f"{type(part.store).__name__} was not made by this accelerator")
    return part.start, part.tokens, part.store


_CUT_BY_INPUT = ("o_proj", "down_proj")


def linear_factory(profile: Profile, shard: Shard = WHOLE) -> LinearFactory:
    """Linear layers in the profile's formats, emulated; a rank's share of them takes and gives what the rank holds."""
    weights, activations = quant.operand_format(profile.weights), quant.operand_format(profile.activations)

    def by_output(weight: torch.Tensor, site: LinearSite) -> Linear:
        # Stacked matrices keep their own groups, because every part is a multiple of the group (`Profile.check`), and
        # scales of rows are of a part's own.
        values, scale = weights.quantize_weight(weight)
        cut = [_cut(x, site, shard) for x in (values, scale) if x is not None]
        rounded = quant.Operand(cut[0], cut[1] if len(cut) > 1 else None)
        return lambda x: quant.multiply(activations.quantize(x), rounded, x.dtype)

    def by_input(weight: torch.Tensor) -> Linear:
        values, scale = weights.quantize_weight(weight)
        rounded = quant.Operand(shard.inputs(values).contiguous(), scale)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            row_scale = activations.scale(x)
            if row_scale is not None:
                row_scale = shard.largest(row_scale)
            part = quant.multiply(activations.quantize(x, row_scale), rounded, torch.float32)
            return shard.sum(part).to(x.dtype)

        return multiply

    def make(weight: torch.Tensor, site: LinearSite) -> Linear:
        if shard.count > 1 and site.name in _CUT_BY_INPUT:
            return by_input(weight)
        return by_output(weight, site)

    return make


def _cut(stacked: torch.Tensor, site: LinearSite, shard: Shard) -> torch.Tensor:
    if shard.count == 1:
        return stacked
    return torch.cat([shard.outputs(part) for part in torch.split(stacked, list(site.parts))])
