"""What an engine computes with on an NVIDIA GPU: memory, intake, kernels, and whether they fit.

KV arrives beside the steps, not between them: a block is copied from its pinned slot on a stream of its own and brought
into its pages' order on another, so that neither the host nor a step waits for the other. A step waits for pages when
it first reads them.

A format is kept as it came if the attention kernel reads it, and becomes BF16 on arrival otherwise; so do keys whose
channels are in the interleaved order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.memory_plan import MemoryPlan, weight_bytes, workspace_bytes
from hma_serve.decode.engine_parts import EngineParts, EngineSpec
from hma_serve.decode.gpu_runner import GpuStepRunner
from hma_serve.decode.intake import FusedIntake, MaterialisedIntake, Packed
from hma_serve.decode.kernels.attention_call import HEAD_DIMS, HEADS_AT_ONCE
from hma_serve.decode.kernels.page_kinds import BLOCK_FLOAT, PackedKind
from hma_serve.decode.kernels.page_orders import fragment_page, packed_kind
from hma_serve.decode.kernels.step_model import StepModel
from hma_serve.decode.page_order import Role
from hma_serve.decode.pages import KvGeometry, Need, PagePool
from hma_serve.model import open_weights
from hma_serve.model.pinning import pin
from hma_serve.quant import codec
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT

_log = logging.getLogger(__name__)

_RESERVE = 1 << 30
"""Bytes for captured graphs and for the workspaces of cuBLAS."""
_COPIES_OF_SLOTS = 2
"""On the GPU at a time at most: as it came, and in its pages' order."""
_BF16_BYTES = 2


def open_cuda(spec: EngineSpec, slots: memoryview) -> EngineParts:
    """Loads the model onto the current GPU and takes the memory for KV.

    Args:
        spec: What to load.
        slots: Where blocks arrive; is pinned.

    Raises:
        InvalidArgument: The model's shape or dtype has no kernels.
        FailedPrecondition: There is no GPU, or the model does not fit it; says the arithmetic.
    """
    _require_supported(spec)
    device = torch.device("cuda", torch.cuda.current_device())
    config = spec.config
    free = torch.cuda.mem_get_info(device)[0]
    capacity = kv_capacity(spec, free, torch.cuda.get_device_name(device), slots.nbytes)
    pin(slots)
    with open_weights(spec.checkpoint, config, device=device, dtype=torch.bfloat16, progress=spec.progress) as weights:
        offsets = None if spec.k_offsets is None else spec.k_offsets.to(device)
        ptx = torch.version.hip is None
        model = StepModel(config, weights, offsets, ptx=ptx, own_products=ptx)
    pool = PagePool(
        KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim),
        packed_formats=[name for name in spec.codecs if packed_kind(name) is not None],
        plain_dtype=torch.bfloat16,
        capacity_tokens=capacity,
        orders=fragment_page,
        device=device,
    )
    intake = CudaIntake(pool, offsets, fused=spec.kv_mode == "fused")
    intake.warm_up(spec.codecs)
    runner = GpuStepRunner(
        model,
        pool,
        step_tokens=spec.step_tokens,
        sequences=spec.max_running,
        max_tokens=spec.max_model_len,
        kinds=expected_kinds(spec.codecs if spec.kv_mode == "fused" else ()),
        arrivals=intake.arrivals,
    )
    runner.warm_up()
    return EngineParts(
        device=torch.cuda.get_device_name(device),
        device_bytes=torch.cuda.get_device_properties(device).total_memory,
        pool=pool,
        intake=intake,
        runner=runner,
        sampling=device,
        # The device computes meanwhile, and storing is copies that it makes by itself. The other half of a step is for
        # what else the host has to do.
        arrival_share=0.5,
        overlap=True,
    )


class CudaIntake:
    """`Intake` on streams of its own.

    Args:
        pool: The pages, on a GPU.
        k_offsets: See `MaterialisedIntake`; on the GPU.
        fused: Keep what the attention kernel reads as it came.
    """

    def __init__(self, pool: PagePool, k_offsets: torch.Tensor | None, *, fused: bool) -> None:
        self._pool = pool
        self._device = pool.memory.device
        self._fused = FusedIntake(pool) if fused else None
        self._materialised = MaterialisedIntake(pool, k_offsets)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.arrivals = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None

    def need(self, packed: Packed, total_tokens: int) -> Need:
        """See `Intake`."""
        return self._of(packed).need(packed, total_tokens)

    @torch.inference_mode()
    def store(
        self, packed: Packed, role: Role, layer: int, addresses: torch.Tensor, heads: slice, units: torch.Tensor
    ) -> None:
        """See `Intake`."""
        with torch.cuda.stream(self._copies):
            there = units.to(self._device, non_blocking=True)
            self._copied = self._copies.record_event()
        self.arrivals.wait_event(self._copied)
        with torch.cuda.stream(self.arrivals):
            self._of(packed).store(packed, role, layer, addresses, heads, there)
        there.record_stream(self.arrivals)

    def placed(self, addresses: torch.Tensor) -> torch.Tensor:
        """See `Intake`."""
        with torch.cuda.stream(self.arrivals):
            return addresses.pin_memory().to(self._device, non_blocking=True)

    def warm_up(self, codecs: Sequence[str]) -> None:
        """Compiles what stores blocks in these codecs, by storing one of each into pages that nobody has yet."""
        heads, head_dim = self._pool.geometry.kv_heads, self._pool.geometry.head_dim
        addresses = self.placed(torch.zeros(1, dtype=torch.int64))
        for name in codecs:
            packed = Packed(name, name, KV_ROPE_PAIRING_HALF_SPLIT, GROUP_TOKENS)
            if self._of(packed) is self._fused:
                units = torch.zeros(heads, 1, codec(name).group_bytes(head_dim), dtype=torch.uint8)
                for role in Role:
                    self.store(packed, role, 0, addresses, slice(0, heads), units)
        self.settle()
        torch.cuda.synchronize(self._device)

    def settle(self) -> None:
        """See `Intake`."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _of(self, packed: Packed) -> FusedIntake | MaterialisedIntake:
        return self._fused if self._fused is not None and stays_packed(packed) else self._materialised


def expected_kinds(codecs: Sequence[str]) -> list[PackedKind]:
    """What pages in these codecs hold, in their order; if the kernel reads none of them, block float."""
    kinds = [kind for name in codecs if (kind := packed_kind(name)) is not None]
    return list(dict.fromkeys(kinds)) or [BLOCK_FLOAT]


def stays_packed(packed: Packed) -> bool:
    """Whether the attention kernel reads it as it came."""
    read = packed_kind(packed.k_codec) is not None and packed_kind(packed.v_codec) is not None
    return read and not packed.interleaved


def _require_supported(spec: EngineSpec) -> None:
    config = spec.config
    if not torch.cuda.is_available():
        raise FailedPrecondition("--device cuda needs an NVIDIA GPU that torch can use", field="--device")
    if spec.dtype is not torch.bfloat16:
        raise InvalidArgument("on a GPU decode computes in bfloat16", field="--dtype")
    if config.head_dim not in HEAD_DIMS or config.group_size > HEADS_AT_ONCE:
        raise InvalidArgument(
            f"the GPU's attention needs a head_dim of {', '.join(map(str, HEAD_DIMS))} and at most {HEADS_AT_ONCE} "
            f"query heads per KV head; the model has {config.head_dim} and {config.group_size}",
            field="--model",
        )


def kv_capacity(spec: EngineSpec, free: int, device: str, slot_bytes: int) -> int:
    """Unquantised tokens of KV to make room for: as asked, or what is left of the GPU.

    Args:
        spec: What to load.
        free: Bytes of the GPU that nobody has taken.
        device: Its name.
        slot_bytes: Of all slots that blocks arrive in.

    Raises:
        FailedPrecondition: That does not fit beside the weights; the message has the arithmetic.
    """
    config = spec.config
    per_token = config.kv_elements_per_token * _BF16_BYTES
    workspace = workspace_bytes(config, _BF16_BYTES, tokens=spec.step_tokens, sampled=spec.max_running) + _RESERVE
    workspace += _COPIES_OF_SLOTS * slot_bytes
    weights = weight_bytes(config, _BF16_BYTES)
    left = (free - weights - workspace) // per_token
    # More than every running request's whole window is of no use; packed ones may be wider than plain ones.
    tokens = spec.kv_capacity_tokens or min(
        max(spec.max_model_len, left * 19 // 20), 2 * spec.max_running * spec.max_model_len
    )
    plan = MemoryPlan(weights=weights, kv=tokens * per_token, workspace=workspace, available=free, device=device)
    _log.info("memory: %s", plan)
    plan.check("choose a smaller model or lower --kv-capacity-tokens or --max-model-len")
    return tokens
