"""What differs between devices of an engine, and the parts for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.attention import TorchPagedAttention
from hma_serve.decode.intake import FusedIntake, Intake, MaterialisedIntake
from hma_serve.decode.pages import KvGeometry, PagePool
from hma_serve.decode.runner import StepRunner, TorchStepRunner
from hma_serve.model import Progress, Transformer, open_weights


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to load.

    Attributes:
        checkpoint: Where the model lies.
        config: Its configuration.
        dtype: Of weights and of KV that decode computes.
        codecs: Of KV that is accepted.
        k_offsets: What packed keys have been moved by, float32 [layers, kv_heads, head_dim]; None: nothing.
        kv_mode: `fused` or `materialise`.
        kv_capacity_tokens: Unquantised tokens of KV that fit; 0: from the device's memory.
        max_model_len: Tokens of a request at most.
        max_running: Requests at most.
        step_tokens: Tokens of a step at most.
        progress: Told of the loading.
    """

    checkpoint: Path
    config: ModelConfig
    dtype: torch.dtype
    codecs: Sequence[str]
    k_offsets: torch.Tensor | None
    kv_mode: str
    kv_capacity_tokens: int
    max_model_len: int
    max_running: int
    step_tokens: int
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine computes with.

    Attributes:
        device: Its name, for people.
        device_bytes: Of its memory; 0: it has none of its own.
        pool: All pages.
        intake: Puts packed KV into them.
        runner: Computes steps.
        sampling: Where tokens are drawn.
        arrival_share: Of a step's time that the host may take to store KV between two steps.
        overlap: It works behind the host's back, so the next step may begin before the last one's tokens are known.
    """

    device: str
    device_bytes: int
    pool: PagePool
    intake: Intake
    runner: StepRunner
    sampling: torch.device
    arrival_share: float
    overlap: bool


def open_cpu(spec: EngineSpec) -> EngineParts:
    """Loads the model into this machine's memory."""
    config = spec.config
    with open_weights(spec.checkpoint, config, dtype=spec.dtype, progress=spec.progress) as weights:
        model = Transformer(config, weights)
    pool = PagePool(
        KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim),
        packed_formats=spec.codecs,
        plain_dtype=spec.dtype,
        capacity_tokens=spec.kv_capacity_tokens,
    )
    fused = spec.kv_mode == "fused"
    return EngineParts(
        device="cpu",
        device_bytes=0,
        pool=pool,
        intake=FusedIntake(pool) if fused else MaterialisedIntake(pool, spec.k_offsets),
        runner=TorchStepRunner(model, pool, TorchPagedAttention(pool, config.num_heads, spec.k_offsets)),
        sampling=torch.device("cpu"),
        arrival_share=0.15,
        overlap=False,
    )
