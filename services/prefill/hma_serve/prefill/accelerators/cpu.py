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
from hma_serve.prefill.accelerators.packed_kv import DecodedBudget, TensorKv, offset_tensor
from hma_serve.prefill.attention import StoredAttention
from hma_serve.prefill.kv_layout import KvLayout
from hma_serve.prefill.profiles import Profile

DECODED_BYTES = 1 << 30
"""Of decoded KV by default."""

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class CpuAccelerator:
    """See `hma_serve.prefill.accelerators.Accelerator`.

    Args:
        spec: What to load.
        weights: Whole tensors by name, in the profile's dtype; None: the checkpoint's.
    """

    device = "cpu"

    def __init__(self, spec: AcceleratorSpec, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        profile, model = spec.profile, spec.model
        self._layout = KvLayout.of(model, profile)
        self._codecs = (quant.codec(profile.k_codec), quant.codec(profile.v_codec))
        self._k_offsets = offset_tensor(spec)
        self._budget = DecodedBudget(spec.decoded_bytes or DECODED_BYTES)
        self._dtype = DTYPES[profile.compute]
        with contextlib.ExitStack() as stack:
            if weights is None:
                weights = stack.enter_context(_opened(spec, self._dtype))
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


def linear_factory(profile: Profile) -> LinearFactory:
    """Linear layers in the profile's formats, emulated."""
    weights, activations = quant.operand_format(profile.weights), quant.operand_format(profile.activations)

    def make(weight: torch.Tensor, site: LinearSite) -> Linear:
        # Stacked matrices keep their own groups, because every part is a multiple of the group (`Profile.check`), and
        # scales of rows are of a part's own.
        rounded = weights.quantize_weight(weight)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            return quant.multiply(activations.quantize(x), rounded, x.dtype)

        return multiply

    return make
