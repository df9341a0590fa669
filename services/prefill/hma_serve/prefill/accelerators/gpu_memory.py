"""What a share of a model takes of a GPU, said before anything is loaded, and refused when it is not there."""

from __future__ import annotations

import logging
import math

import torch

from hma_serve.core.memory_plan import MemoryPlan, workspace_bytes
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import tensor_shapes
from hma_serve.model.tensors import EMBEDDING
from hma_serve.prefill.kv_layout import KvLayout

_BF16_BYTES = 2
# Of the CUDA context's own, of matrix libraries and of fragments; about what a process takes before its first tensor.
_RESERVE = 1 << 30
# Tokens computed together that the workspace is counted for.
_CHUNK_TOKENS = 2048

_log = logging.getLogger(__name__)


def require_room(model: ModelConfig, weight_format: str, device: torch.device) -> int:
    """Prints what the weights need of a GPU.

    Args:
        model: Its configuration, or that of a rank's share.
        weight_format: Of the matrices, as profiles name it.
        device: A CUDA device.

    Returns:
        Bytes that are left for KV.

    Raises:
        FailedPrecondition: They do not fit; the message has the arithmetic.
    """
    free, _ = torch.cuda.mem_get_info(device)
    plan = gpu_memory_plan(model, weight_format, free, torch.cuda.get_device_name(device))
    _log.info("memory: %s", plan)
    plan.check("choose a smaller model, a profile with smaller weights, or more devices with --tp")
    return free - plan.needed


def gpu_memory_plan(model: ModelConfig, weight_format: str, available: int, device: str) -> MemoryPlan:
    """The arithmetic. KV is not in it: prompts take what is left, and wait for it (`kv_tokens`)."""
    matrix_bytes = _BF16_BYTES if weight_format == "bf16" else 1
    weights = model.max_position_embeddings * model.head_dim * 4
    for name, shape in tensor_shapes(model, with_head=False).items():
        quantised = len(shape) == 2 and name != EMBEDDING
        weights += math.prod(shape) * (matrix_bytes if quantised else _BF16_BYTES)
    workspace = workspace_bytes(model, _BF16_BYTES, tokens=_CHUNK_TOKENS) + _RESERVE
    return MemoryPlan(weights=weights, kv=0, workspace=workspace, available=available, device=device)


def kv_tokens(layout: KvLayout, left: int) -> int:
    """Tokens of packed KV that fit bytes of which the allocator's rounding takes a little."""
    return left * 19 // 20 // layout.token_bytes
