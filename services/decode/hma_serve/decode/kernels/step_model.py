"""One decode step of a model as a fixed sequence of kernels, so that it can be captured once and replayed.

Products of more than `MOST_ROWS` rows go to cuBLAS, everything else to the kernels of this package. Nothing here
allocates while a step runs and nothing depends on lengths: those are in device memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch.nn import functional

from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.kernels.attention_call import AttentionWork, LayerPages, QueryOperand, StepRows
from hma_serve.decode.kernels.elementwise import embed, gate, project, residual_norm
from hma_serve.decode.kernels.launch import nvidia
from hma_serve.decode.kernels.matvec import matvec
from hma_serve.decode.kernels.skinny import MOST_ROWS, skinny
from hma_serve.model.rotary import rotary_table
from hma_serve.model.tensors import EMBEDDING, FINAL_NORM, HEAD, layer_tensor

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a step of so many rows reads and writes beside weights and pages.

    Attributes:
        token: int32 [rows], the row's token; below 0: -1 - the row of the step before that drew it.
        last: int64 [rows at most], what the step before drew.
        chosen: int64 [rows], the rows whose logits are wanted, in order.
        rows: Whose pages they read.
    """

    token: torch.Tensor
    last: torch.Tensor
    chosen: torch.Tensor
    rows: StepRows


class StepModel:
    """Weights, and the sequence of kernels over them.

    Args:
        config: The model's.
        weights: Tensors by their Hugging Face names, bfloat16 on the device; each is asked for once.
        k_offsets: What packed keys have been moved by, float32 [layers, kv_heads, head_dim]; None: nothing.
        ptx: False runs twins in plain Triton: for the interpreter and for other vendors' GPUs.
        own_products: Multiply few rows by kernels of this package, not by cuBLAS.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        k_offsets: torch.Tensor | None = None,
        *,
        ptx: bool = True,
        own_products: bool = True,
    ) -> None:
        self.config = config
        self._ptx = ptx
        self._own_products = own_products
        self._embedding = weights[EMBEDDING]
        self._layers = [_layer(weights, index) for index in range(config.num_layers)]
        self._final_norm = weights[FINAL_NORM]
        self._head = self._embedding if config.tie_word_embeddings else weights[HEAD]
        self._cos_sin = rotary_table(
            config.head_dim, config.rope_theta, config.max_position_embeddings, self._embedding.device
        )
        self._k_offsets = None if k_offsets is None else k_offsets.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def matrices(self) -> Iterator[torch.Tensor]:
        """Of every product of a step, in order: [outputs, inputs]."""
        for layer in self._layers:
            yield from (layer.qkv, layer.output, layer.gate_up, layer.down)
        yield self._head

    def multiply(self, x: torch.Tensor, matrix: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        """X [rows, inputs] times a matrix [outputs, inputs], transposed, in parts that are to be added; whole: in one.

        Returns:
            [parts, rows, outputs]: float32, or, if it is one part, the dtype of X.
        """
        if len(x) == 1 and self._own_products:
            return matvec(x, matrix, ptx=self._ptx)[None]
        if len(x) <= MOST_ROWS and self._own_products:
            return skinny(x, matrix, ptx=self._ptx, whole=whole)
        if self._ptx:
            # It chooses better kernels than cuBLAS itself.
            torch.backends.cuda.preferred_blas_library("cublaslt")
        return functional.linear(x, matrix)[None]

    def run(
        self, memory: StepMemory, pages: Sequence[Sequence[LayerPages]], works: Sequence[AttentionWork]
    ) -> torch.Tensor:
        """Enqueues a step.

        Args:
            memory: Its inputs; row counts are those of its tensors.
            pages: Of each work, each layer's.
            works: One for each kind of rows: of pages that they read, and of single tokens or several together.

        Returns:
            [rows, vocab]: logits of the chosen rows, in the weights' dtype.
        """
        config, rows = self.config, len(memory.token)
        hidden = self._embedding.new_empty((rows, config.hidden_size))
        blocks = triton.cdiv(config.hidden_size, _BLOCK)
        embed[(rows, blocks)](
            memory.token, memory.last, self._embedding, hidden, WIDTH=config.hidden_size, BLOCK=_BLOCK
        )
        for work in works:
            work.number()
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            x = self._norm(hidden, delta, layer.input_norm)
            attended = self._attend(index, layer, self.multiply(x, layer.qkv), memory.rows, pages, works)
            x = self._norm(hidden, self.multiply(attended, layer.output), layer.mlp_norm)
            delta = self.multiply(self._gated(x, layer.gate_up), layer.down)
        x = self._norm(hidden, delta, self._final_norm)
        return self.multiply(x.index_select(0, memory.chosen), self._head, whole=True)[0]

    def _norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        width = self.config.hidden_size
        residual_norm[(len(hidden),)](
            hidden,
            hidden if delta is None else delta,
            gain,
            out,
            self.config.rms_norm_eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            PARTS=0 if delta is None else len(delta),
            PTX=self._ptx,
            num_warps=16 if width > 2048 else 4,
            **nvidia(self._ptx),
        )
        return out

    def _gated(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of X times the matrix, transposed: [rows, width of the MLP]."""
        if self._own_products and 1 < len(x) <= MOST_ROWS:
            return skinny(x, matrix, ptx=self._ptx, gated=True)[0]
        up, width = self.multiply(x, matrix)[0], self.config.intermediate_size
        out = self._embedding.new_empty((len(x), width))
        gate[(len(x), triton.cdiv(width, _BLOCK))](
            up, out, WIDTH=width, BLOCK=_BLOCK, PTX=self._ptx, **nvidia(self._ptx)
        )
        return out

    def _attend(
        self,
        index: int,
        layer: _Layer,
        qkv: torch.Tensor,
        rows: StepRows,
        pages: Sequence[Sequence[LayerPages]],
        works: Sequence[AttentionWork],
    ) -> torch.Tensor:
        config, (parts, count, _) = self.config, qkv.shape
        shape = (count, config.num_heads, config.head_dim)
        offset, new = self._k_offsets, self._embedding.new_empty
        query = QueryOperand(
            f16=new(shape, dtype=torch.float16),
            bf16=new(shape),
            factor=new(shape[:2], dtype=torch.float32),
            offset=None if offset is None else new(shape[:2], dtype=torch.float32),
        )
        own = pages[0][index]
        # Not launched before the product is over: attention would begin on multiprocessors that are still divided for
        # the product, most of their cache as its shared memory, and its loads lack that cache until it ends.
        project[(count, config.num_kv_heads)](
            qkv,
            layer.q_norm,
            layer.k_norm,
            self._cos_sin,
            query.f16,
            query.bf16,
            query.factor,
            query.factor if query.offset is None else query.offset,
            self._cos_sin if offset is None else offset[index],
            own.memory.view(torch.bfloat16),
            own.k_table,
            own.v_table,
            rows.slot,
            rows.length,
            config.rms_norm_eps,
            own.k_table.stride(0),
            2 * own.memory.stride(0),
            KV=config.num_kv_heads,
            G=config.group_size,
            D=config.head_dim,
            HEADS=triton.next_power_of_2(config.group_size),
            OFFSET=offset is not None,
            PARTS=parts,
            PTX=self._ptx,
            num_warps=4,
        )
        out = new(shape)
        for work, of_layer in zip(works, pages, strict=True):
            work.attend(query, of_layer[index], out, scale=config.head_dim**-0.5, ptx=self._ptx, overlap=self._ptx)
        return out.flatten(1)


def _layer(weights: Mapping[str, torch.Tensor], index: int) -> _Layer:
    def stacked(*names: str) -> torch.Tensor:
        parts = [weights[layer_tensor(index, name)] for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return _Layer(
        input_norm=stacked("input_layernorm"),
        qkv=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=stacked("self_attn.q_norm"),
        k_norm=stacked("self_attn.k_norm"),
        output=stacked("self_attn.o_proj"),
        mlp_norm=stacked("post_attention_layernorm"),
        gate_up=stacked("mlp.gate_proj", "mlp.up_proj"),
        down=stacked("mlp.down_proj"),
    )
