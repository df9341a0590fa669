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
from hma_serve.model import CausalAttention, Linear, LinearFactory, LinearSite, Transformer, open_weights
from hma_serve.prefill.profiles import Profile, find_profile

GROUP = 32

Packed = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer the packed K and V, uint8 [heads, groups, group bytes]."""


def _rounded_linear(profile: Profile) -> LinearFactory:
    """Both operands rounded to the profile's formats, part by part, as if q, k and v (gate and up) were apart."""
    weights, activations = quant.operand_format(profile.weights), quant.operand_format(profile.activations)

    def make(weight: torch.Tensor, site: LinearSite) -> Linear:
        parts = [weights.quantize_weight(part) for part in torch.split(weight, list(site.parts))]
        values = torch.cat([part.values for part in parts])
        scales = [part.scale for part in parts if part.scale is not None]
        rounded = quant.Operand(values, torch.cat(scales) if scales else None)
        return lambda x: quant.multiply(activations.quantize(x), rounded, x.dtype)

    return make


class _RoundedAttention:
    """Causal attention of a whole prompt over its K and V after a round trip through the codec, kept packed."""

    def __init__(self, k_codec: quant.TorchCodec, v_codec: quant.TorchCodec) -> None:
        self._codecs = (k_codec, v_codec)
        self.packed: Packed = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /) -> torch.Tensor:
        packed = [codec.encode(x.transpose(0, 1).contiguous()) for codec, x in zip(self._codecs, (k, v), strict=True)]
        self.packed.append((packed[0], packed[1]))
        keys, values = (
            codec.decode(x, dtype=q.dtype).transpose(0, 1).contiguous()
            for codec, x in zip(self._codecs, packed, strict=True)
        )
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
    config, rules = read_model_config(checkpoint), find_profile(profile)
    dtype = torch.bfloat16 if rules.compute == "bf16" else torch.float32
    with open_weights(checkpoint, config, dtype=dtype, with_head=False) as weights:
        model = Transformer(config, weights, linear=_rounded_linear(rules))
    attention = _RoundedAttention(quant.codec(rules.k_codec), quant.codec(rules.v_codec))
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
        profile: Any built-in one.
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
    codecs = [quant.codec(name) for name in (find_profile(profile).k_codec, find_profile(profile).v_codec)]
    for layer, roles in enumerate(packed):
        keys, values = (
            codec.decode(part, dtype=dtype).transpose(0, 1) for codec, part in zip(codecs, roles, strict=True)
        )
        attention(layer, torch.zeros_like(keys), keys, values)
