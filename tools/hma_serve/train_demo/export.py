"""Writes the trained model as a Hugging Face directory that transformers loads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from hma_serve.core.model_config import ModelConfig
from hma_serve.train_demo.card import Run, metadata
from hma_serve.train_demo.vocabulary import CHAT_TEMPLATE, END_OF_TEXT, TURN_END


def write_checkpoint(
    directory: Path, config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, runs: list[Run]
) -> None:
    """Writes weights in BF16, configuration, tokenizer and chat template; `runs` are all runs that led here."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, directory / "model.safetensors", metadata=metadata(runs))
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
