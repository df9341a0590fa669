"""Random Qwen3 checkpoints small enough to build in milliseconds, in the layout of real ones.

The tokenizer covers the whole vocabulary (three special tokens, every byte, then pairs of printable characters), so
that any token a random model emits has text and the entire stack can serve the checkpoint.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hma_serve.core.model_config import ModelConfig
from hma_serve.model import tensor_shapes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
_BYTES = 256


def make_tiny_checkpoint(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 80,
    vocab: int = 320,
    tied: bool = True,
    seed: int = 0,
    shards: int = 1,
    old_style_config: bool = False,
    max_position_embeddings: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes config.json, generation_config.json, safetensors and tokenizer.json into `path` and returns it.

    Args:
        path: Directory to create.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Elements per head.
        intermediate: Width of the MLP.
        vocab: Vocabulary, at least 259.
        tied: Whether the head is the embedding.
        seed: Of the weights.
        shards: Number of safetensors files; above 1 an index is written too.
        old_style_config: Write config.json as transformers 4 did.
        max_position_embeddings: Longest context.
        dtype: Type the weights are stored in.
    """
    path.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
    }
    dtype_name = str(dtype).removeprefix("torch.")
    if old_style_config:
        config |= {"rope_theta": 10000.0, "torch_dtype": dtype_name}
    else:
        config |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": dtype_name}
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"eos_token_id": [EOS_TOKEN_ID, 0], "pad_token_id": 0})
    _write_weights(path, ModelConfig.from_dict(config), seed, shards, dtype)
    tiny_tokenizer(vocab).save(str(path / "tokenizer.json"))
    return path


def tiny_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` tokens."""
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab < len(symbols):
        raise ValueError(f"a vocabulary of {vocab} cannot hold {len(symbols)} symbols")
    printable = [chr(code) for code in range(33, 127)]
    merges = list(itertools.islice(itertools.product(printable, printable), vocab - len(symbols)))
    tokens = symbols + [first + second for first, second in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _write_weights(path: Path, config: ModelConfig, seed: int, shards: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: _random(shape, generator, gain="norm" in name).to(dtype) for name, shape in tensor_shapes(config).items()
    }
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(itertools.islice(weights.items(), shard, None, shards))
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _random(shape: tuple[int, ...], generator: torch.Generator, *, gain: bool) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    # Large enough that attention is far from uniform and greedy choices are far from ties.
    return 1 + 0.2 * noise if gain else noise * 1.5 / shape[-1] ** 0.5


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
