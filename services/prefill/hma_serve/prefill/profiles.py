"""Profiles: what an accelerator computes in and what it leaves behind, as data.

A profile fixes every rounding that a prompt's KV goes through, so a retry must use the same one, and a reference that
follows it gets the same bytes. An accelerator decides how; it never decides what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import KvFormatError, codec

_BLOCK_FLOAT_GROUP = 16


@dataclass(frozen=True, slots=True)
class Profile:
    """The arithmetic of one kind of prefill.

    Attributes:
        name: What `--profile` and the registry call it.
        weights: Format of every linear layer's weight: `f32`, `bf16`, or `tt_bfp8` (block float in groups of 16 along
            the output features, the layout of a weight stored as [in, out]).
        activations: Format of what enters a linear layer: `f32`, `bf16`, or `tt_bfp8` (groups of 16 along the input
            features).
        compute: Dtype of the residual stream, norms and accumulation: `f32` or `bf16`.
        k_codec: Wire codec of keys, which attention reads as stored.
        v_codec: Wire codec of values, likewise.
    """

    name: str
    weights: str
    activations: str
    compute: str
    k_codec: str
    v_codec: str

    def check(self, model: ModelConfig) -> None:
        """Refuses a model whose sizes the formats cannot hold.

        Raises:
            FailedPrecondition: Names the size at fault.
        """
        for role, name in (("K", self.k_codec), ("V", self.v_codec)):
            try:
                codec(name).check_geometry(model.head_dim)
            except KvFormatError as exc:
                raise FailedPrecondition(
                    f"profile {self.name} does not fit this model: {role} codec {name}: {exc}", field="--profile"
                ) from exc
        if "tt_bfp8" not in (self.weights, self.activations):
            return
        for name, size in _grouped_sizes(model).items():
            if size % _BLOCK_FLOAT_GROUP:
                raise FailedPrecondition(
                    f"profile {self.name} does not fit this model: {name} is {size}, not a multiple of "
                    f"{_BLOCK_FLOAT_GROUP}, the group of the block format",
                    field="--profile",
                )


def _grouped_sizes(model: ModelConfig) -> Mapping[str, int]:
    """Every dimension along which weights or activations form groups."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads x head_dim": model.q_size,
        "num_key_value_heads x head_dim": model.kv_size,
    }


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile("f32", "f32", "f32", "f32", "f32", "f32"),
            Profile("bf16", "bf16", "bf16", "bf16", "bf16", "bf16"),
            # Tenstorrent: BFP8 operands, FP32 accumulation and residual, the KV cache in the chip's own tiles.
            Profile("tt_bfp8", "tt_bfp8", "tt_bfp8", "f32", "tt_bfp8_b", "tt_bfp8_b"),
        )
    }
)
"""Every profile by name."""


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        InvalidArgument: There is none; the message lists those there are.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise InvalidArgument(
            f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}", field="--profile"
        ) from None
