"""A small KV stream of two layers, two heads and 64 tokens, and the golden files written from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hma_serve import kvblock
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROUNDING_NEAREST_EVEN,
    KvBlockHeader,
    KvManifest,
    KvProducer,
    KvRope,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TICKET = bytes(range(16))
EPOCH = 3
HEADS, TOKENS, HEAD_DIM, LAYERS = 2, 64, 32, 2
TOKEN_START = 32
FINGERPRINT = "5f" * 32
ROPE = KvRope(pairing=KV_ROPE_PAIRING_HALF_SPLIT, theta=1e6)


def small_manifest(codec: str = "tt_bfp8_b", token_count: int = TOKENS) -> KvManifest:
    return kvblock.build_manifest(
        model_fingerprint=FINGERPRINT,
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        k_codec=kvblock.codec(codec),
        token_start=TOKEN_START,
        token_count=token_count,
        rope=ROPE,
        qk_norm=True,
        rounding=KV_ROUNDING_NEAREST_EVEN,
        producer=KvProducer(instance="golden", vendor="hma-serve"),
    )


def small_plan(codec: str = "tt_bfp8_b", token_count: int = TOKENS) -> kvblock.StreamPlan:
    return kvblock.validate_manifest(small_manifest(codec, token_count))


def golden_values() -> NDArray[np.float32]:
    """float32 [2, 64, 32]: the worked example's row, subnormals, large and tiny values, ties, and normal numbers."""
    return np.fromfile(GOLDEN / "kvblock" / "values.f32.bin", dtype="<f4").reshape(HEADS, TOKENS, HEAD_DIM)


def random_units(plan: kvblock.StreamPlan, seed: int = 0) -> NDArray[np.uint8]:
    """Valid packed units of one layer and role, uint8 [heads, groups, group_bytes]."""
    role_plan = next(iter(plan.roles.values()))
    shape = (role_plan.kv_heads, plan.token_count, role_plan.head_dim)
    return role_plan.codec.encode(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def one_block(plan: kvblock.StreamPlan, **fields: object) -> tuple[KvBlockHeader, NDArray[np.uint8]]:
    """The stream's first block (layer 1, K, everything at once), with some header fields overwritten."""
    writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
    header, payload = next(writer.blocks(1, KV_ROLE_K, random_units(plan), token_start=plan.token_start))
    block = header.block
    for name, value in fields.items():
        setattr(block, name, value)
    return block, np.ascontiguousarray(payload).reshape(-1)
