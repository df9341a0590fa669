"""What a model needs of a device's memory, said before anything is loaded, and refused when it is not there.

An estimate from shapes alone: weights and KV exactly, the workspace of a step generously. A refusal after a minute of
loading, or in the middle of a request, would be worse than one that is a few percent too careful.
"""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.model_config import ModelConfig

# Bytes of a row's temporaries in the sampler, for each token of the vocabulary: logits, weights in float64, their sums
# and order, and what was counted.
_SAMPLED_BYTES = 45
# Temporaries of the widest layer that live at the same time, in units of its output.
_LIVE_OUTPUTS = 4
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights: All of them.
        kv: The pages.
        workspace: Of a step, and of loading.
        available: What is there now.
        device: Its name, for people.
    """

    weights: int
    kv: int
    workspace: int
    available: int
    device: str

    @property
    def needed(self) -> int:
        """Everything."""
        return self.weights + self.kv + self.workspace

    def __str__(self) -> str:
        return (
            f"weights {readable_bytes(self.weights)} + KV {readable_bytes(self.kv)} + workspace "
            f"{readable_bytes(self.workspace)} = {readable_bytes(self.needed)} of {readable_bytes(self.available)} "
            f"available on {self.device}"
        )

    def check(self, advice: str) -> None:
        """Raises FailedPrecondition, with the arithmetic and what to do, if it does not fit."""
        if self.needed > self.available:
            raise FailedPrecondition(f"the model does not fit: {self}; {advice}", field="--model")


def weight_bytes(config: ModelConfig, itemsize: int, *, with_head: bool = True) -> int:
    """Of all weights at `itemsize` bytes each, and of the table of rotations."""
    parameters = config.parameter_count
    if not with_head:
        parameters -= config.hidden_size
        parameters -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return parameters * itemsize + config.max_position_embeddings * config.head_dim * 4


def workspace_bytes(config: ModelConfig, itemsize: int, *, tokens: int, sampled: int = 0) -> int:
    """Of a step of `tokens` that draws `sampled` tokens, or of stacking matrices at loading if that is more."""
    widest = max(2 * config.intermediate_size, config.q_size + 2 * config.kv_size)
    step = _LIVE_OUTPUTS * tokens * widest * max(itemsize, 4) + sampled * config.vocab_size * _SAMPLED_BYTES
    return max(step, widest * config.hidden_size * itemsize)


def readable_bytes(count: int) -> str:
    """A size for people, in decimal units: 1.2 GB."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
