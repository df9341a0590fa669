"""Parsing of config.json: both styles, derived quantities, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.model_config import ModelConfig

OLD_STYLE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in OLD_STYLE.items() if name not in names}


def test_qwen3_4b_has_the_published_quantities() -> None:
    config = ModelConfig.from_dict(OLD_STYLE)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.group_size) == (36, 32, 8, 4)
    assert (config.hidden_size, config.q_size, config.kv_size) == (2560, 4096, 1024)
    assert config.kv_bytes_per_token == 147_456
    assert config.kv_elements_per_token == 73_728
    assert round(config.parameter_count / 1e9, 2) == 4.02
    assert (config.rope_theta, config.dtype, config.tie_word_embeddings) == (1e6, "bfloat16", True)


def test_untied_32b_counts_its_head() -> None:
    sizes = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    config = ModelConfig.from_dict(OLD_STYLE | sizes | {"tie_word_embeddings": False})
    assert round(config.parameter_count / 1e9, 2) == 32.76
    assert config.kv_bytes_per_token == 262_144


def test_both_styles_mean_the_same() -> None:
    new_style = without("rope_theta", "rope_scaling", "torch_dtype") | {
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 36,
        "transformers_version": "5.17.0",
    }
    assert ModelConfig.from_dict(new_style) == ModelConfig.from_dict(OLD_STYLE)


def test_an_unused_window_length_is_no_sliding_window() -> None:
    assert ModelConfig.from_dict(OLD_STYLE | {"sliding_window": 4096}) == ModelConfig.from_dict(OLD_STYLE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "llama3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(FailedPrecondition, match=named):
        ModelConfig.from_dict(OLD_STYLE | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "2560"}, "hidden_size"),
        ({"hidden_size": 2560.0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_key_value_heads": 5}, "5 key/value heads"),
        ({"head_dim": 33}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"torch_dtype": "int8"}, "dtype"),
        ({"torch_dtype": 16}, "dtype"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_parameters": [1]}, "rope parameters"),
        ({"architectures": "Qwen3ForCausalLM!"}, "architectures"),
        ({"layer_types": 7}, "layer_types"),
    ],
)
def test_malformed_fields_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        ModelConfig.from_dict(OLD_STYLE | change)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "rope_theta", "intermediate_size"])
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} is missing"):
        ModelConfig.from_dict(without(name))


def test_defaults_are_those_of_transformers() -> None:
    config = ModelConfig.from_dict(without("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"))
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (
        32,
        128,
        1e-6,
        False,
    )
