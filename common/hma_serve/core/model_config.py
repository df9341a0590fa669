"""What a Qwen3 checkpoint's config.json means to us, as one frozen value.

Every process of a cluster derives its shapes, its KV geometry and its limits from this value, so anything that would
change the arithmetic without our noticing (another architecture, rope scaling, sliding windows, biases) is refused here
by name rather than ignored. Parsing is pure: reading files belongs to `hma_serve.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hma_serve.core.errors import FailedPrecondition, InvalidArgument

ARCHITECTURE = "Qwen3ForCausalLM"
DTYPES = ("bfloat16", "float16", "float32")
_BF16_BYTES = 2
_MAX_DIMENSION = 1 << 24

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a dense Qwen3 model.

    Attributes:
        vocab_size: Rows of the embedding, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Elements per head; `num_heads * head_dim` need not equal `hidden_size`.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        max_position_embeddings: Longest context in tokens.
        tie_word_embeddings: The output head is the embedding.
        dtype: Element type the weights are stored in: bfloat16, float16 or float32.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if not 0 < getattr(self, name) <= _MAX_DIMENSION:
                raise InvalidArgument(f"model config: {name} must be 1..{_MAX_DIMENSION}, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise InvalidArgument(f"model config: head_dim must be even for rotary positions, got {self.head_dim}")
        if not 0.0 < self.rms_norm_eps < 1.0:
            raise InvalidArgument(f"model config: rms_norm_eps must lie between 0 and 1, got {self.rms_norm_eps}")
        if not 1.0 < self.rope_theta < float("inf"):
            raise InvalidArgument(f"model config: rope_theta must be finite and above 1, got {self.rope_theta}")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"model config: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        """Width of the query projection: `num_heads * head_dim`."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the value projection: `num_kv_heads * head_dim`."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache, all layers, keys and values."""
        return 2 * self.num_layers * self.kv_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's KV in BF16."""
        return self.kv_elements_per_token * _BF16_BYTES

    @property
    def parameter_count(self) -> int:
        """Distinct parameters; a tied head counts once."""
        attention = 2 * self.hidden_size * (self.q_size + self.kv_size) + 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a config.json, in the style of transformers 4 or 5.

        Version 4 wrote `rope_theta` and `torch_dtype`; version 5 writes `rope_parameters` and `dtype`.

        Args:
            raw: The parsed JSON object.

        Returns:
            The validated configuration.

        Raises:
            InvalidArgument: A field is missing, of the wrong type or out of range.
            FailedPrecondition: The checkpoint needs something we do not implement; the message names it.
        """
        _refuse_unsupported(raw)
        num_heads = _number(raw, "num_attention_heads", int)
        hidden_size = _number(raw, "hidden_size", int)
        return cls(
            vocab_size=_number(raw, "vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=_number(raw, "intermediate_size", int),
            num_layers=_number(raw, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=_number(raw, "num_key_value_heads", int, num_heads),
            # Qwen3's own default, which transformers applies to files that leave the field out.
            head_dim=_number(raw, "head_dim", int, 128),
            rms_norm_eps=_number(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(raw),
            max_position_embeddings=_number(raw, "max_position_embeddings", int),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            dtype=_dtype(raw),
        )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Names the first feature of the checkpoint that we would otherwise compute wrongly."""
    architectures, layer_types = _listed(raw, "architectures"), _listed(raw, "layer_types")
    if raw.get("model_type") != "qwen3" or (architectures and ARCHITECTURE not in architectures):
        found = architectures[0] if architectures else raw.get("model_type")
        raise FailedPrecondition(f"unsupported architecture {found!r}: only dense {ARCHITECTURE} is implemented")
    if raw.get("use_sliding_window") or "sliding_attention" in layer_types:
        raise FailedPrecondition("unsupported: sliding window attention (use_sliding_window)")
    if raw.get("attention_bias"):
        raise FailedPrecondition("unsupported: biases in the attention projections (attention_bias)")
    if raw.get("hidden_act", "silu") != "silu":
        raise FailedPrecondition(f"unsupported: activation {raw['hidden_act']!r}, only silu is implemented")
    if raw.get("quantization_config"):
        raise FailedPrecondition("unsupported: pre-quantised weights (quantization_config)")
    _refuse_rope_scaling(raw.get("rope_scaling"))
    _refuse_rope_scaling(raw.get("rope_parameters"))


def _refuse_rope_scaling(rope: object) -> None:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise InvalidArgument(f"model config: rope parameters must be an object, got {type(rope).__name__}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FailedPrecondition(f"unsupported: rope scaling of type {kind!r}")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    rope = raw.get("rope_parameters") or {}
    return _number(rope if "rope_theta" in rope else raw, "rope_theta", float)


def _dtype(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype", raw.get("torch_dtype")) or "float32"
    if not isinstance(value, str):
        raise InvalidArgument(f"model config: dtype must be a string, got {type(value).__name__}")
    return value.removeprefix("torch.")


def _number(raw: Mapping[str, Any], name: str, kind: type[_Number], default: _Number | None = None) -> _Number:
    value = raw.get(name, default)
    if value is None:
        value = default
    if value is None:
        raise InvalidArgument(f"model config: {name} is missing")
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InvalidArgument(f"model config: {name} must be a number ({kind.__name__}), got {value!r}")
    return kind(value)


def _listed(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name) or []
    if not isinstance(value, list):
        raise InvalidArgument(f"model config: {name} must be a list, got {value!r}")
    return value


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise InvalidArgument(f"model config: {name} must be true or false, got {value!r}")
    return value
