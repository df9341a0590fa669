"""Tenstorrent cards through ttnn: block-float products at HiFi2, and a KV cache in the chip's own tiles.

*Untested on silicon.* It follows profile `tt_bfp8` (or `tt_bfp4_weights`), whose emulation on the CPU is its reference:
float32 residual, rounding to block float before each product. Heads are split, normed and rotated in BF16, as ttnn's
operations take them, so bytes differ from the reference's in last places, and attention's blocks follow the chunk.

The residual stream stays on the card, per request; between layers the engine holds shapes without memory. A request's
cache is an array of pages of 32 tokens, which ttnn fills and attends to through a page table, and a page of one head is
one group of the wire format.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve import quant
from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.model import LazyWeights, open_weights
from hma_serve.model.rotary import rotary_table
from hma_serve.model.tensors import EMBEDDING, layer_tensor
from hma_serve.prefill.accelerators import AcceleratorSpec, Completion, KvStore, Segment
from hma_serve.prefill.kv_layout import ROLES

if TYPE_CHECKING:
    from collections.abc import Mapping

KV_CODEC = "tt_bfp8_b"
_WEIGHTS = {"tt_bfp8": "bfloat8_b", "tt_bfp4": "bfloat4_b"}
"""Weight formats and ttnn's names of them."""
_LARGEST_BLOCK = 256
"""Of attention, tokens."""


def require_card(spec: AcceleratorSpec) -> None:
    """Refuses what a card cannot do, and a machine without ttnn or a card.

    Raises:
        FailedPrecondition: Says what is missing.
    """
    profile = spec.profile
    if profile.weights not in _WEIGHTS or {profile.k_codec, profile.v_codec} != {KV_CODEC}:
        raise FailedPrecondition(
            f"Tenstorrent cards do not follow profile {profile.name}: choose tt_bfp8 or tt_bfp4_weights",
            field="--profile",
        )
    if spec.shard.count > 1:
        raise FailedPrecondition(
            "--tp is for devices with a process each; a Tenstorrent worker has one card", field="--tp"
        )
    if spec.k_offsets:
        raise FailedPrecondition("K offsets are not subtracted on Tenstorrent cards", field="--k-offsets")
    if spec.model.head_dim % 64 and spec.model.head_dim != GROUP_TOKENS:
        raise FailedPrecondition(f"ttnn rotates heads of 32 or a multiple of 64, not of {spec.model.head_dim}")
    if importlib.util.find_spec("ttnn") is None:
        raise FailedPrecondition(
            "--device tenstorrent needs the package ttnn (Python 3.10 or 3.12) and a card; "
            "--device cpu emulates the same profile",
            field="--device",
        )
    if not _cards():
        raise FailedPrecondition("ttnn finds no Tenstorrent card in this machine", field="--device")


def _cards() -> int:
    import ttnn

    try:
        return int(ttnn.GetNumAvailableDevices())
    except RuntimeError:  # how it says that there is none
        return 0


@dataclass(frozen=True, slots=True)
class _Layer:
    """ttnn tensors; matrices [1, 1, in, out]."""

    input_norm: Any
    qkv: Any
    q_norm: Any
    k_norm: Any
    output: Any
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any


class TenstorrentAccelerator:
    """See `hma_serve.prefill.accelerators.Accelerator`.

    Args:
        spec: What to load, onto the first card.
    """

    kv_tokens = None

    def __init__(self, spec: AcceleratorSpec) -> None:
        require_card(spec)
        import ttnn

        from hma_serve.prefill.accelerators import tenstorrent_host as host

        self._ttnn, self._host = ttnn, host
        self._model = spec.model
        self._card = ttnn.open_device(device_id=0)
        self.device = f"Tenstorrent {str(self._card.arch()).rpartition('.')[2].title()}"
        self._weights = getattr(ttnn, _WEIGHTS[spec.profile.weights])
        self._exact = ttnn.init_device_compute_kernel_config(
            self._card.arch(),
            math_fidelity=ttnn.MathFidelity.HiFi2,
            math_approx_mode=False,
            fp32_dest_acc_en=True,
            packer_l1_acc=True,
        )
        with _opened(spec) as weights:
            self._embedding = weights[EMBEDDING]
            self._layers = [self._layer(weights, index) for index in range(spec.model.num_layers)]
        table = rotary_table(
            spec.model.head_dim, spec.model.rope_theta, spec.model.max_position_embeddings, torch.device("cpu")
        )
        self._cos, self._sin = (self._to_card(torch.cat([half, half], -1)) for half in table.chunk(2, dim=-1))

    def _layer(self, weights: Mapping[str, torch.Tensor], index: int) -> _Layer:
        def vector(name: str) -> Any:
            return self._to_card(weights[layer_tensor(index, name)][None])

        def matrix(*names: str) -> Any:
            parts = [weights[layer_tensor(index, name)] for name in names]
            return self._to_card(torch.cat(parts).T, self._weights)

        return _Layer(
            input_norm=vector("input_layernorm"),
            qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=vector("self_attn.q_norm"),
            k_norm=vector("self_attn.k_norm"),
            output=matrix("self_attn.o_proj"),
            mlp_norm=vector("post_attention_layernorm"),
            gate=matrix("mlp.gate_proj"),
            up=matrix("mlp.up_proj"),
            down=matrix("mlp.down_proj"),
        )

    def _to_card(self, x: torch.Tensor, dtype: object = None) -> Any:
        """A matrix [rows, columns] as [1, 1, rows, columns] in tiles; BF16 unless told otherwise."""
        return self._host.to_tiles(x.float().numpy()[None, None], dtype or self._ttnn.bfloat16, self._card)

    def pin(self, memory: memoryview) -> None:
        """See `Accelerator`: ttnn copies through buffers of its own."""

    def fence(self) -> Completion | None:
        """See `Accelerator`: `run_layer` waits for the card."""
        return None

    def new_store(self, tokens: int) -> KvStore:
        """See `Accelerator`."""
        return CardKv(self._ttnn, self._card, self._model.num_layers, self._model.num_kv_heads, tokens, self._head_dim)

    @property
    def _head_dim(self) -> int:
        return self._model.head_dim

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Accelerator`."""
        return torch.nn.functional.embedding(torch.tensor(token_ids), self._embedding)

    def run_layer(self, layer: int, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """See `Accelerator`; what it returns has a shape and no memory."""
        row = 0
        for part in segments:
            store = part.store
            if not isinstance(store, CardKv):
                raise TypeError(f"{type(store).__name__} was not made by this accelerator")
            if layer == 0:
                rows = hidden[row : row + part.tokens]
                store.residual = self._to_card(rows, self._ttnn.float32)
            store.residual = self._run(self._layers[layer], store, layer, part.start, part.tokens)
            row += part.tokens
        self._ttnn.synchronize_device(self._card)
        return torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")

    def _run(self, weights: _Layer, store: CardKv, layer: int, start: int, tokens: int) -> Any:
        """One segment through one layer; its residual stream float32 [1, 1, tokens, hidden]."""
        tt, experimental = self._ttnn, self._ttnn.experimental
        x = store.residual
        qkv = self._product(self._norm(x, weights.input_norm), weights.qkv, tt.bfloat16)
        q, k, v = experimental.nlp_create_qkv_heads(
            qkv, num_heads=self._model.num_heads, num_kv_heads=self._model.num_kv_heads, transpose_k_heads=False
        )
        ends = [0, 0, start, 0], [1, 1, start + tokens, self._head_dim]
        cos, sin = (tt.slice(table, *ends) for table in (self._cos, self._sin))
        q, k = (
            experimental.rotary_embedding_hf(self._norm(heads, gain), cos, sin)
            for heads, gain in ((q, weights.q_norm), (k, weights.k_norm))
        )
        store.append(layer, start, k, v)
        block = math.gcd(start, tokens, _LARGEST_BLOCK)
        attended = tt.transformer.chunked_scaled_dot_product_attention(
            q,
            *store.pages(layer),
            store.page_table,
            start,
            program_config=tt.SDPAProgramConfig(
                compute_with_storage_grid_size=self._card.compute_with_storage_grid_size(),
                q_chunk_size=block,
                k_chunk_size=block,
                exp_approx_mode=False,
            ),
            compute_kernel_config=self._exact,
        )
        x = tt.add(x, self._product(experimental.nlp_concat_heads(attended), weights.output, tt.float32))
        normed = tt.typecast(self._norm(x, weights.mlp_norm), tt.bfloat8_b)
        gate, up = (self._product(normed, weight, tt.bfloat16) for weight in (weights.gate, weights.up))
        inner = tt.mul(gate, up, input_tensor_a_activations=[tt.UnaryOpType.SILU])
        return tt.add(x, self._product(inner, weights.down, tt.float32))

    def _norm(self, x: Any, gain: Any) -> Any:
        return self._ttnn.rms_norm(x, epsilon=self._model.rms_norm_eps, weight=gain, compute_kernel_config=self._exact)

    def _product(self, x: Any, weight: Any, dtype: object) -> Any:
        """Rounds the left side to block float, as the right one is, and multiplies."""
        if x.dtype != self._ttnn.bfloat8_b:
            x = self._ttnn.typecast(x, self._ttnn.bfloat8_b)
        return self._ttnn.linear(x, weight, dtype=dtype, compute_kernel_config=self._exact)


class CardKv:
    """See `hma_serve.prefill.accelerators.KvStore`: pages of 32 tokens on the card, block float.

    Attributes:
        residual: The request's residual stream between layers, on the card.
        page_table: Of ttnn's operations; page i holds the tokens from 32 i on.
    """

    def __init__(self, ttnn: Any, card: Any, layers: int, heads: int, tokens: int, head_dim: int) -> None:
        self._ttnn = ttnn
        self._shape = (tokens // GROUP_TOKENS, heads, GROUP_TOKENS, head_dim)
        self.residual: Any = None
        self.page_table = self._table(card, 0, self._shape[0])
        self._card = card
        self._codec = quant.codec(KV_CODEC)

        def empty() -> Any:
            return ttnn.zeros(self._shape, dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT, device=card)

        self._pages: dict[tuple[int, int], Any] = {(layer, role): empty() for layer in range(layers) for role in ROLES}

    def _table(self, card: Any, first: int, stop: int) -> Any:
        pages = np.arange(first, stop, dtype=np.int32)[None]
        return self._ttnn.Tensor(pages, self._ttnn.int32, card, self._ttnn.ROW_MAJOR_LAYOUT)

    def pages(self, layer: int) -> Sequence[Any]:
        """Keys and values of a layer [pages, heads, 32, D]."""
        return [self._pages[layer, role] for role in ROLES]

    def append(self, layer: int, start: int, keys: Any, values: Any) -> None:
        """Packs [1, heads, tokens, D] into the pages from token `start` on."""
        first = start // GROUP_TOKENS
        table = self._table(self._card, first, first + keys.shape[2] // GROUP_TOKENS)
        for pages, fresh in zip(self.pages(layer), (keys, values), strict=True):
            packed = self._ttnn.typecast(fresh, self._ttnn.bfloat8_b)
            self._ttnn.experimental.paged_fill_cache(pages, packed, table, batch_idx=0)

    def copy_out(self, layer: int, role: int, heads: slice, groups: slice, out: NDArray[np.uint8]) -> Completion | None:
        """See `KvStore`."""
        from hma_serve.prefill.accelerators.tenstorrent_host import group_bytes

        count, total, *page = self._shape
        first, last, _ = groups.indices(count)
        head, end, _ = heads.indices(total)
        part = self._ttnn.slice(self._pages[layer, role], [first, head, 0, 0], [last, end, *page])
        out[:] = group_bytes(part, (last - first, end - head))
        return None

    def copy_in(self, layer: int, role: int, heads: slice, groups: slice, packed: NDArray[np.uint8]) -> None:
        """See `KvStore`; all heads at once. Packing what a packed tile decodes to gives the tile again."""
        from hma_serve.prefill.accelerators.tenstorrent_host import to_tiles

        if heads.indices(self._shape[1])[:2] != (0, self._shape[1]):
            raise ValueError("pages are filled with all their heads at once")
        values = self._codec.decode(torch.from_numpy(np.ascontiguousarray(packed)))  # [heads, tokens, D]
        fresh = to_tiles(values.float().numpy()[None], self._ttnn.bfloat8_b, self._card)
        table = self._table(self._card, *groups.indices(self._shape[0])[:2])
        self._ttnn.experimental.paged_fill_cache(self._pages[layer, role], fresh, table, batch_idx=0)


def _opened(spec: AcceleratorSpec) -> LazyWeights:
    return open_weights(spec.checkpoint, spec.model, dtype=torch.float32, with_head=False, progress=spec.progress)
