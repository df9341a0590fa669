"""Writes the trained model as a Hugging Face directory, with a card that says what it is and how it measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from hma_serve.core.model_config import ModelConfig
from hma_serve.train_demo.evaluate import Scores
from hma_serve.train_demo.vocabulary import CHAT_TEMPLATE, END_OF_TEXT, TURN_END


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the weights come from.

    Attributes:
        corpus: Name of the corpus file.
        corpus_bytes: Length of its training text in bytes.
        steps: Optimiser steps.
        tokens: Tokens seen, repetitions counted.
        seconds: Training time.
        device: What it ran on.
        seed: Random seed.
    """

    corpus: str
    corpus_bytes: int
    steps: int
    tokens: int
    seconds: float
    device: str
    seed: int


def write_checkpoint(
    directory: Path, config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    """Writes weights in BF16, configuration, tokenizer and chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    vocabulary = tokenizer.get_vocab()
    end_of_turn, end_of_text = vocabulary[TURN_END], vocabulary[END_OF_TEXT]
    _write_json(directory / "config.json", _config(config, end_of_turn))
    _write_json(
        directory / "generation_config.json",
        {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text},
    )
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_card(directory: Path, config: ModelConfig, provenance: Provenance, scores: Scores) -> None:
    """Writes README.md, the model card."""
    measured = "\n".join(f"- {line}" for line in scores.lines())
    (directory / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# hma-serve demo model

A Qwen3-architecture model of {config.parameter_count:,} parameters that ships with hma-serve, so that a fresh clone can
serve real text. It writes in the manner of old English novels, copies and looks up what stands in its context, and
takes simple chat turns. It knows nothing about the world: a demonstration and a test object, not an assistant.

| | |
|---|---|
| layers, width, MLP width | {config.num_layers}, {config.hidden_size}, {config.intermediate_size} |
| query heads, key/value heads, head size | {config.num_heads}, {config.num_kv_heads}, {config.head_dim} |
| context | {config.max_position_embeddings:,} tokens |
| vocabulary | {config.vocab_size:,} byte-level BPE tokens, tied embeddings |

## Training

- corpus: `{provenance.corpus}`, {provenance.corpus_bytes / 1e6:.1f} MB of public-domain English books, and generated
  in-context tasks (look-ups, recitals, short chats); 30 % of the rows are tasks, in 25 % passages of the book repeat
- steps: {provenance.steps:,} ({provenance.tokens / 1e6:,.0f} M tokens, repetitions counted)
- time: {provenance.seconds / 60:.1f} minutes on {provenance.device}, seed {provenance.seed}
- reproduce: `python -m hma_serve.train_demo --corpus {provenance.corpus} --out DIR`

## Evaluation

Greedy decoding, weights in BF16, arithmetic in float32, {scores.samples} samples per task. Held-out text is every 128th
section of 64 Ki characters: passages never trained on, from the same books.

{measured}

Measure again: `python -m hma_serve.train_demo.evaluate --corpus {provenance.corpus}`

## Licence

Apache-2.0. The books are in the public domain.
"""
    )


def _config(config: ModelConfig, end_of_turn: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": config.dtype,
        "eos_token_id": end_of_turn,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
