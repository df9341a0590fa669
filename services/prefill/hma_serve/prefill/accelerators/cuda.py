"""NVIDIA and AMD GPUs through torch: BF16, FP8 or INT8 products, and one fused pass between any two of them.

A layer is four products and five passes: norm and quantise; QK norm, rotation and the packing of K and V; attention
over what was packed; quantise; norm and quantise; SwiGLU and quantise. The arithmetic is the profile's as
`hma_serve.quant` defines it, but a matrix library sums in its own order, and may choose another kernel for another
number of rows: bytes differ from the reference's in last places, and so may those of another chunk size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hma_serve import quant
from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import LazyWeights, open_weights
from hma_serve.model.pinning import pin
from hma_serve.model.rotary import rotary_table
from hma_serve.model.tensors import EMBEDDING, layer_tensor
from hma_serve.prefill.accelerators import AcceleratorSpec, Completion, KvStore, Segment
from hma_serve.prefill.accelerators.causal import attend
from hma_serve.prefill.accelerators.cuda_linear import CODES, GpuLinear, gpu_linear
from hma_serve.prefill.accelerators.gpu_kv import GpuKv, Recorded
from hma_serve.prefill.accelerators.gpu_memory import kv_tokens, require_room
from hma_serve.prefill.accelerators.packed_kv import offset_tensor
from hma_serve.prefill.decoded_budget import DecodedBudget
from hma_serve.prefill.kernels.quantize_rows import normed_rows, plain_rows, swiglu_rows
from hma_serve.prefill.kernels.store_kv import CODECS, store_kv
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.profiles import Profile

DECODED_BYTES = 8 << 30
"""Of decoded KV at most by default: 50,000 tokens of an 8B model; packed KV takes the rest of what weights leave."""


class CudaAccelerator:
    """See `hma_serve.prefill.accelerators.Accelerator`.

    Args:
        spec: What to load, onto the GPU with the rank's number.
        weights: Whole tensors by name, bfloat16, on any device; None: the checkpoint's.
    """

    def __init__(self, spec: AcceleratorSpec, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        require_device(spec.profile, spec.shard.rank)
        self._device = torch.device("cuda", spec.shard.rank)
        torch.cuda.set_device(self._device)
        self.device = torch.cuda.get_device_name(self._device)
        self._profile, self._shard = spec.profile, spec.shard
        self.model = spec.shard.local(spec.model)
        self._layout = KvLayout.of(self.model, spec.profile)
        self._codecs = (quant.codec(spec.profile.k_codec), quant.codec(spec.profile.v_codec))
        left = require_room(self.model, spec.profile.weights, self._device)
        room = min(DECODED_BYTES, left // 2) if spec.decoded_bytes is None else spec.decoded_bytes
        self._budget = DecodedBudget(room)
        self.kv_tokens: int | None = kv_tokens(self._layout, left - room)
        offsets = offset_tensor(spec)
        self._k_offsets = None if offsets is None else offsets.to(self._device)
        self._dtype = CODES[spec.profile.activations]
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with contextlib.ExitStack() as stack:
            if weights is None:
                weights = stack.enter_context(_opened(spec, self._device))
            self._embedding = weights[EMBEDDING]
            self._layers = [self._layer(spec.model, weights, index) for index in range(spec.model.num_layers)]
        self._cos_sin = rotary_table(
            self.model.head_dim, self.model.rope_theta, self.model.max_position_embeddings, self._device
        )

    def _layer(self, model: ModelConfig, weights: Mapping[str, torch.Tensor], index: int) -> _Layer:
        def vector(name: str) -> torch.Tensor:
            return weights[layer_tensor(index, name)]

        def linear(*names: str, by_input: bool = False) -> GpuLinear:
            parts = [weights[layer_tensor(index, name)] for name in names]
            return gpu_linear(self._profile.weights, parts, self._shard, by_input=by_input)

        return _Layer(
            input_norm=vector("input_layernorm"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=vector("self_attn.q_norm"),
            k_norm=vector("self_attn.k_norm"),
            output=linear("self_attn.o_proj", by_input=True),
            mlp_norm=vector("post_attention_layernorm"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj", by_input=True),
        )

    def pin(self, memory: memoryview) -> None:
        """See `Accelerator`."""
        pin(memory)

    def fence(self) -> Completion | None:
        """See `Accelerator`."""
        return Recorded(torch.cuda.current_stream(self._device))

    def new_store(self, tokens: int) -> KvStore:
        """See `Accelerator`."""
        return GpuKv(
            self._layout,
            self._codecs,
            tokens,
            head_dim=self.model.head_dim,
            dtype=torch.bfloat16,
            device=self._device,
            budget=self._budget,
            copies=self._copies,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Accelerator`."""
        ids = torch.tensor(token_ids, dtype=torch.int64).to(self._device)
        return torch.nn.functional.embedding(ids, self._embedding)

    @torch.inference_mode()
    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """See `Accelerator`; writes into `hidden` and returns it."""
        weights, eps, model = self._layers[layer], self.model.rms_norm_eps, self.model
        share = self._shard.largest if self._shard.count > 1 else None
        qkv = weights.qkv(normed_rows(hidden, weights.input_norm, eps, self._dtype))
        q = qkv.new_empty((len(hidden), model.num_heads, model.head_dim))
        attended = []
        row = 0
        for part in segments:
            rows = slice(row, row + part.tokens)
            keys, values = self._store(layer, weights, qkv, q, row, part)
            attended.append(attend(q[rows], keys, values).flatten(1))
            row += part.tokens
        rows_in = attended[0] if len(attended) == 1 else torch.cat(attended)
        output = weights.output(plain_rows(rows_in, self._dtype, share=share))
        gate_up = weights.gate_up(normed_rows(hidden, weights.mlp_norm, eps, self._dtype, delta=output))
        return hidden.add_(weights.down(swiglu_rows(gate_up, self._dtype, share=share)))

    def _store(
        self,
        layer: int,
        weights: _Layer,
        qkv: torch.Tensor,
        q: torch.Tensor,
        row: int,
        part: Segment,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns a segment's projections into queries and stored KV; returns the latter, decoded, up to its end."""
        kv, end = part.store, part.start + part.tokens
        if not isinstance(kv, GpuKv):
            raise TypeError(f"{type(kv).__name__} was not made by this accelerator")
        names = (self._profile.k_codec, self._profile.v_codec)
        offset = None if self._k_offsets is None else self._k_offsets[layer]
        fused = all(name in CODECS for name in names)
        if fused:
            decoded = [kv.writable(layer, role, part.start, end) for role in ROLES]
        else:
            decoded = [qkv.new_empty((part.tokens, self._layout.heads, self.model.head_dim)) for _ in ROLES]
        store_kv(
            qkv,
            self._cos_sin,
            (weights.q_norm, weights.k_norm),
            self.model.rms_norm_eps,
            q=q,
            packed=(kv.packed(layer, ROLES[0]), kv.packed(layer, ROLES[1])) if fused else None,
            decoded=(decoded[0], decoded[1]),
            codecs=names,
            k_offset=offset if fused else None,
            row=row,
            tokens=part.tokens,
            start=part.start,
        )
        if not fused:
            fresh = decoded[0] if offset is None else decoded[0].float() - offset, decoded[1]
            for role, values in zip(ROLES, fresh, strict=True):
                kv.append(layer, role, part.start, values)
            decoded = [kv.read(layer, role, end) for role in ROLES]
        return decoded[0][:end], decoded[1][:end]


def _opened(spec: AcceleratorSpec, device: torch.device) -> LazyWeights:
    return open_weights(
        spec.checkpoint, spec.model, device=device, dtype=torch.bfloat16, with_head=False, progress=spec.progress
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: GpuLinear
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    output: GpuLinear
    mlp_norm: torch.Tensor
    gate_up: GpuLinear
    down: GpuLinear


def require_device(profile: Profile, rank: int = 0) -> None:
    """Refuses what this machine's GPUs cannot do.

    Raises:
        FailedPrecondition: Says what is missing.
    """
    if profile.compute != "bf16" or profile.weights != profile.activations or profile.weights not in CODES:
        raise FailedPrecondition(
            f"GPUs do not follow profile {profile.name} (weights {profile.weights}, activations {profile.activations}, "
            f"compute {profile.compute}): they take {', '.join(CODES)} throughout, with compute bf16; "
            "--device cpu emulates any profile",
            field="--profile",
        )
    if not torch.cuda.is_available():
        raise FailedPrecondition(f"torch {torch.__version__} sees no GPU; --device cpu needs none", field="--device")
    if rank >= torch.cuda.device_count():
        raise FailedPrecondition(
            f"there are {torch.cuda.device_count()} GPUs here, too few for rank {rank}", field="--tp"
        )
    fnuz = "gfx94" in getattr(torch.cuda.get_device_properties(rank), "gcnArchName", "")
    if profile.weights.startswith("fp8"):
        _require_fp8(profile, rank, fnuz=fnuz)


def _require_fp8(profile: Profile, rank: int, *, fnuz: bool) -> None:
    name = torch.cuda.get_device_name(rank)
    if torch.version.hip is None and torch.cuda.get_device_capability(rank) < (8, 9):
        raise FailedPrecondition(f"{name} has no FP8 products; choose profile int8 or bf16", field="--profile")
    if fnuz != (profile.weights == "fp8_e4m3fnuz"):
        fitting = "fp8_e4m3fnuz" if fnuz else "fp8_e4m3"
        raise FailedPrecondition(
            f"{name} reads FP8 in another way than profile {profile.name}; choose profile {fitting}", field="--profile"
        )
