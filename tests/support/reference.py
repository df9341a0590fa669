"""What the whole system must compute, written straight down: one process, one sequence, no chunks, no services.

Shares the model and the quantisation functions with the product and nothing else: neither prefill's scheduler,
chunking, attention and caches nor decode's. What prefill's profile rounds is rounded here by its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hma_serve import quant
from hma_serve.checkpoint import read_model_config
from hma_serve.model import CausalAttention, Linear, LinearSite, Transformer, dense_linear, open_weights

GROUP = 32

Packed = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer the packed K and V, uint8 [heads, groups, group bytes]."""

_CODECS = {"f32": "f32", "bf16": "bf16", "tt_bfp8": "tt_bfp8_b"}


def _bfp8_linear(weight: torch.Tensor, site: LinearSite) -> Linear:
    """Both operands rounded to BFP8: the weight in groups of 16 output features, the input in groups of 16 features."""
    # Part by part, as if q, k and v (gate and up) were separate matrices; [in, out] as the vendor stores it.
    parts = [quant.fake_quantize_bfp8(part.T.contiguous(), axis=-1).T for part in torch.split(weight, list(site.parts))]
    rounded = torch.cat(parts).contiguous()
    return lambda x: torch.nn.functional.linear(quant.fake_quantize_bfp8(x, axis=-1), rounded)


class _RoundedAttention:
    """Causal attention of a whole prompt over its K and V after a round trip through the codec, kept packed."""

    def __init__(self, codec: quant.TorchCodec) -> None:
        self._codec = codec
        self.packed: Packed = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        packed_k, packed_v = (self._codec.encode(x.transpose(0, 1).contiguous()) for x in (k, v))
        self.packed.append((packed_k, packed_v))
        keys, values = (self._codec.decode(x, dtype=q.dtype).transpose(0, 1).contiguous() for x in (packed_k, packed_v))
        out = torch.empty_like(q)
        # Matrix products round by their shape, and bytes are compared bit for bit, so the 32 tokens of a group go
        # together against all keys up to the group's end: the definition in docs, not an optimisation.
        for start in range(0, q.shape[0], GROUP):
            rows, end = slice(start, start + GROUP), start + GROUP
            visible = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                keys[:end].transpose(0, 1)[None],
                values[:end].transpose(0, 1)[None],
                attn_mask=visible,
                enable_gqa=True,
            )
            out[rows] = attended[0].transpose(0, 1)
        return out


@torch.inference_mode()
def reference_packed_kv(checkpoint: Path, profile: str, token_ids: Sequence[int]) -> Packed:
    """The KV that a prefill worker with that profile must put on the wire for whole groups of tokens."""
    config = read_model_config(checkpoint)
    dtype = torch.bfloat16 if profile == "bf16" else torch.float32
    linear = _bfp8_linear if profile == "tt_bfp8" else dense_linear
    with open_weights(checkpoint, config, dtype=dtype, with_head=False) as weights:
        model = Transformer(config, weights, linear=linear)
    attention = _RoundedAttention(quant.codec(_CODECS[profile]))
    model.forward(torch.tensor(token_ids), torch.arange(len(token_ids)), attention)
    return attention.packed


@torch.inference_mode()
def reference_generate(
    checkpoint: Path,
    profile: str,
    prompt_ids: Sequence[int],
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Greedy tokens: whole groups of the prompt by the profile, everything else in `dtype` over their decoded KV.

    Args:
        checkpoint: Directory.
        profile: `f32`, `bf16` or `tt_bfp8`.
        prompt_ids: At least one token.
        max_tokens: How many to generate; end-of-sequence tokens do not stop it.
        dtype: Decode's.

    Returns:
        `max_tokens` token ids.
    """
    config = read_model_config(checkpoint)
    with open_weights(checkpoint, config, dtype=dtype) as weights:
        model = Transformer(config, weights)
    attention = CausalAttention(config.num_layers)
    packed_tokens = (len(prompt_ids) - 1) // GROUP * GROUP
    if packed_tokens:
        _preload(attention, reference_packed_kv(checkpoint, profile, prompt_ids[:packed_tokens]), profile, dtype)
    tokens, position, generated = list(prompt_ids[packed_tokens:]), packed_tokens, []
    for _ in range(max_tokens):
        positions = torch.arange(position, position + len(tokens))
        hidden = model.forward(torch.tensor(tokens), positions, attention)
        position += len(tokens)
        tokens = [int(model.logits(hidden[-1:]).argmax())]
        generated += tokens
    return generated


def _preload(attention: CausalAttention, packed: Packed, profile: str, dtype: torch.dtype) -> None:
    """Fills an empty cache with decoded KV, by attending to it with queries that nobody looks at."""
    codec = quant.codec(_CODECS[profile])
    for layer, roles in enumerate(packed):
        keys, values = (codec.decode(part, dtype=dtype).transpose(0, 1) for part in roles)
        attention(layer, torch.zeros_like(keys), keys, values)
