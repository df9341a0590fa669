"""The names and shapes that a Qwen3 checkpoint of a given configuration must contain, and how they are fused.

One place knows the Hugging Face names; loading, the demo's trainer and the tests' random checkpoints all ask it.
"""

from __future__ import annotations

from hma_serve.core.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_tensor(layer: int, name: str) -> str:
    """The full name of a decoder layer's tensor, `name` being for example `self_attn.q_proj`."""
    return f"model.layers.{layer}.{name}.weight"


def tensor_shapes(config: ModelConfig, *, with_head: bool = True) -> dict[str, tuple[int, ...]]:
    """Every tensor the model reads.

    Args:
        config: The model's configuration.
        with_head: False leaves out what only sampling needs (final norm and output head), as prefill does.

    Returns:
        Shapes by name, in the order in which the model reads them. A tied head is not listed.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (config.q_size, hidden),
            "self_attn.k_proj": (config.kv_size, hidden),
            "self_attn.v_proj": (config.kv_size, hidden),
            "self_attn.q_norm": (config.head_dim,),
            "self_attn.k_norm": (config.head_dim,),
            "self_attn.o_proj": (hidden, config.q_size),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (config.intermediate_size, hidden),
            "mlp.up_proj": (config.intermediate_size, hidden),
            "mlp.down_proj": (hidden, config.intermediate_size),
        }.items():
            shapes[layer_tensor(layer, name)] = shape
    if with_head:
        shapes[FINAL_NORM] = (hidden,)
        if not config.tie_word_embeddings:
            shapes[HEAD] = (config.vocab_size, hidden)
    return shapes
