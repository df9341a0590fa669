"""How much memory prompts may take, decided before anything is loaded, so that no admitted prompt ever lacks it.

Weights and the workspace of a chunk come first. Of what they leave on this machine, packed KV of running prompts takes
half at most, the prefix cache a quarter, and decoded copies of running prompts' KV a quarter, none more than it has use
for. What a flag asks for is taken at its word, and refused if it does not fit. Other devices look after their own
memory; only the prefix cache is always here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.memory_plan import MemoryPlan, readable_bytes, weight_bytes, workspace_bytes
from hma_serve.prefill.config import PrefillConfig
from hma_serve.prefill.decoded_budget import HOST_DECODED_BYTES
from hma_serve.prefill.served_model import ServedModel

# Of the prefix cache unless a flag says otherwise.
_PREFIX_CACHE_BYTES = 1 << 30
_COMPUTE_BYTES = {"f32": 4, "bf16": 2}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What prompts may take.

    Attributes:
        kv_tokens: Tokens of running prompts; at least one longest prompt.
        prefix_cache_bytes: Of packed KV of prompts seen before.
        decoded_bytes: Of decoded copies of running prompts' KV; None: as suits the device.
    """

    kv_tokens: int
    prefix_cache_bytes: int
    decoded_bytes: int | None


def decide_capacity(config: PrefillConfig, model: ServedModel, available: int) -> Capacity:
    """Shares this machine's memory out, and says how.

    Args:
        config: What was asked for.
        model: What is to be served.
        available: Bytes of this machine that nobody has taken.

    Raises:
        FailedPrecondition: It does not fit; the message has the arithmetic.
        InvalidArgument: The prefix cache alone does not.
    """
    most = config.max_running * model.max_tokens
    if config.device != "cpu":
        cache = _prefix_cache_bytes(config, available)
        if cache > available:
            raise InvalidArgument(
                f"a prefix cache of {readable_bytes(cache)} does not fit the {readable_bytes(available)} that this "
                "machine has left; lower --prefix-cache-bytes",
                field="--prefix-cache-bytes",
            )
        return Capacity(config.kv_capacity_tokens or most, cache, None)
    itemsize, shape, layout = _COMPUTE_BYTES[model.profile.compute], model.config, model.layout
    weights = weight_bytes(shape, itemsize, with_head=False)
    slots = config.max_running * config.layers_ahead * layout.layer_bytes(min(config.chunk_tokens, model.max_tokens))
    workspace = workspace_bytes(shape, itemsize, tokens=min(config.chunk_tokens, most)) + slots
    left = max(0, available - weights - workspace)
    tokens = config.kv_capacity_tokens or max(model.max_tokens, min(most, left // 2 // layout.token_bytes))
    cache = _prefix_cache_bytes(config, left)
    decoded = min(HOST_DECODED_BYTES, left // 4, tokens * shape.kv_elements_per_token * itemsize)
    plan = MemoryPlan(
        weights=weights,
        kv=tokens * layout.token_bytes + cache + decoded,
        workspace=workspace,
        available=available,
        device="this machine",
    )
    _log.info("memory: %s", plan)
    plan.check("choose a smaller model or lower --max-model-len, --kv-capacity-tokens or --prefix-cache-bytes")
    return Capacity(tokens, cache, decoded)


def _prefix_cache_bytes(config: PrefillConfig, left: int) -> int:
    if config.prefix_cache_bytes is not None:
        return config.prefix_cache_bytes
    return min(_PREFIX_CACHE_BYTES, left // 4)
