"""Instance records for tests, and waiting for a fleet to look as it should."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hma_serve.core.worker import (
    CodecSpec,
    DeviceInfo,
    KvCodecId,
    KvRopePairing,
    KvRounding,
    KvScaleGranularity,
    KvSupport,
    ModelInfo,
    RopeSpec,
    WorkerInfo,
    WorkerLimits,
    WorkerRole,
    mint_instance,
)
from hma_serve.registry import FleetSnapshot, Watcher
from hma_serve.v1 import kv_block_pb2


def a_worker(role: WorkerRole = WorkerRole.DECODE, instance: str = "", address: str = "127.0.0.1:50071") -> WorkerInfo:
    """A record in which every field has a value that is not its default."""
    return WorkerInfo(
        instance=instance or mint_instance(role),
        role=role,
        address=address,
        model=ModelInfo(
            id="demo",
            fingerprint="ab" * 32,
            layers=6,
            hidden=256,
            heads=8,
            kv_heads=2,
            head_dim=64,
            vocab=4096,
            rope=RopeSpec(KvRopePairing.HALF_SPLIT, 1e6, "cd" * 32),
            kv_fingerprint="ef" * 32,
        ),
        codecs=(
            CodecSpec(KvCodecId.TT_BFP8_B, 1, KvScaleGranularity.TENSOR, KvRounding.NEAREST_EVEN),
            CodecSpec(KvCodecId.BF16),
        ),
        limits=WorkerLimits(
            max_model_len=2048, max_running=8, max_waiting=2, kv_capacity_tokens=1 << 40, overcommit=True
        ),
        device=DeviceInfo(vendor="cpu", name="test", count=2, memory_bytes=1 << 40, price_per_hour=1.25),
        epoch=3,
        profile="tt_bfp8",
        http_address="127.0.0.1:9091",
        rope_pairings=(KvRopePairing.INTERLEAVED,),
        kv=KvSupport.from_proto(
            kv_block_pb2.KvSupport(
                format_major=1,
                format_minor=1,
                semantic_hash="01" * 32,
                semantics=kv_block_pb2.KvSemantics(
                    model_fingerprint="ef" * 32,
                    layers=6,
                    kv_heads=2,
                    head_dim=64,
                    rope_theta=1e6,
                    rope_scaling_hash="cd" * 32,
                    qk_norm=True,
                    rotation_id=1,
                ),
                k_codecs=[CodecSpec(KvCodecId.INT4).to_proto()],
                v_codecs=[CodecSpec(KvCodecId.BF16).to_proto()],
                page_tokens=[64],
                rope_pairings=[kv_block_pb2.KV_ROPE_PAIRING_INTERLEAVED],
                k_offsets=True,
                extensions=[7],
            )
        ),
    )


def wait_fleet(watcher: Watcher, condition: Callable[[FleetSnapshot], bool], timeout: float = 15.0) -> FleetSnapshot:
    """Blocks until a snapshot meets the condition, and returns that snapshot."""
    found: list[FleetSnapshot] = []
    met = threading.Event()

    def look(snapshot: FleetSnapshot) -> None:
        if condition(snapshot):
            found.append(snapshot)
            met.set()

    unsubscribe = watcher.subscribe(look)
    try:
        assert met.wait(timeout), f"the fleet stayed {watcher.current}"
    finally:
        unsubscribe()
    return found[0]
