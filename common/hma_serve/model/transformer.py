"""Qwen3, dense, written once for every service, for training and for the tests.

Tokens are flat: a forward pass takes T tokens of any number of sequences, in any mixture of prompt chunks and single
steps, and knows of each only its position. Which token sees which is the injected attention's business, so the layers
can be driven one at a time and a layer's KV can leave as soon as that layer is done.

The object holds no state between calls and no reference to the mapping it was built from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.model_config import ModelConfig
from hma_serve.model.attention import Attention
from hma_serve.model.linear import Linear, LinearFactory, LinearSite, dense_linear
from hma_serve.model.norm import rms_norm
from hma_serve.model.rotary import rotary_table, rotate
from hma_serve.model.tensors import EMBEDDING, FINAL_NORM, HEAD, layer_tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Transformer:
    """A Qwen3 model over injected linear layers and attention.

    Attributes:
        config: The model's configuration.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, torch.Tensor], *, linear: LinearFactory = dense_linear
    ) -> None:
        """Builds the model, reading each weight once and in the order of `tensor_shapes`.

        Args:
            config: The model's configuration.
            weights: Tensors by their Hugging Face names, all of one dtype and on one device. Without the final norm the
                model has no head and `logits` is refused.
            linear: Makes each linear layer from its weight.
        """
        self.config = config
        self._embedding = weights[EMBEDDING]
        self._layers = [_build_layer(config, weights, index, linear) for index in range(config.num_layers)]
        self._final_norm = weights.get(FINAL_NORM)
        self._head: Linear | None = None
        if self._final_norm is not None:
            head = self._embedding if config.tie_word_embeddings else weights[HEAD]
            self._head = linear(head, LinearSite("lm_head", None, (config.vocab_size,)))
        self._cos_sin = rotary_table(
            config.head_dim, config.rope_theta, config.max_position_embeddings, self._embedding.device
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self._embedding.dtype

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Looks up token embeddings: int `[T]` to `[T, hidden_size]`."""
        return functional.embedding(token_ids, self._embedding)

    def layer(self, index: int, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Runs one decoder layer.

        Args:
            index: Which layer.
            hidden: Residual stream `[T, hidden_size]`.
            positions: Each token's position in its own sequence, int `[T]`, below `max_position_embeddings`.
            attention: Receives this layer's queries, keys and values; see `Attention`.

        Returns:
            Residual stream `[T, hidden_size]` after the layer.
        """
        layer, eps = self._layers[index], self.config.rms_norm_eps
        q, k, v = self._project(layer, rms_norm(hidden, layer.input_norm, eps), self._cos_sin[positions])
        hidden = hidden + layer.output(attention(index, q, k, v).flatten(1))
        gate, up = layer.gate_up(rms_norm(hidden, layer.mlp_norm, eps)).chunk(2, dim=-1)
        return hidden + layer.down(functional.silu(gate) * up)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and output head: `[R, hidden_size]` to `[R, vocab_size]`.

        Raises:
            FailedPrecondition: The model was built without its head.
        """
        if self._head is None or self._final_norm is None:
            raise FailedPrecondition("this model was loaded without its output head and cannot produce logits")
        return self._head(rms_norm(hidden, self._final_norm, self.config.rms_norm_eps))

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Runs every layer: int `[T]` to the residual stream `[T, hidden_size]` before the final norm."""
        hidden = self.embed(token_ids)
        for index in range(self.config.num_layers):
            hidden = self.layer(index, hidden, positions, attention)
        return hidden

    def _project(
        self, layer: _Layer, x: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[T, heads, head_dim]`, the first two normed per head and rotated."""
        config, eps = self.config, self.config.rms_norm_eps
        q, k, v = torch.split(layer.qkv(x), [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q, k, v = (part.reshape(len(part), -1, config.head_dim) for part in (q, k, v))
        return rotate(rms_norm(q, layer.q_norm, eps), cos_sin), rotate(rms_norm(k, layer.k_norm, eps), cos_sin), v


def _build_layer(config: ModelConfig, weights: Mapping[str, torch.Tensor], index: int, linear: LinearFactory) -> _Layer:
    def vector(name: str) -> torch.Tensor:
        return weights[layer_tensor(index, name)]

    def matrix(site_name: str, *names: str) -> Linear:
        # Matrices that read the same input become one: fewer and larger products, the same arithmetic per row.
        parts = [weights[layer_tensor(index, name)] for name in names]
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        return linear(stacked, LinearSite(site_name, index, tuple(part.shape[0] for part in parts)))

    return _Layer(
        input_norm=vector("input_layernorm"),
        qkv=matrix("qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=vector("self_attn.q_norm"),
        k_norm=vector("self_attn.k_norm"),
        output=matrix("o_proj", "self_attn.o_proj"),
        mlp_norm=vector("post_attention_layernorm"),
        gate_up=matrix("gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
        down=matrix("down_proj", "mlp.down_proj"),
    )
