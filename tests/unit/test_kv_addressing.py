"""Blocks are addressed, so who sends what, in which order and which channel order does not matter to the cache."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve import kvblock, quant
from hma_serve.kvblock import errors
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROLE_LATENT,
    KV_ROLE_STATE,
    KV_ROLE_V,
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROPE_PAIRING_INTERLEAVED,
    KV_ROPE_PAIRING_UNSPECIFIED,
    KvRope,
)
from hma_serve.v1.kv_transfer_pb2 import PushEnd
from support.kv_streams import EPOCH, FINGERPRINT, ROPE, TICKET, small_manifest

ROLES = (KV_ROLE_K, KV_ROLE_V)
# Two producers hold a head range each; each sends its tokens in three parts.
PARTS = [(head, third, layer, role) for head in range(2) for third in range(3) for layer in range(2) for role in ROLES]


@settings(deadline=None, max_examples=30)
@given(st.permutations(PARTS), st.sampled_from(["tt_bfp8_b", "nvfp4", "int4.channel", "fp8_e4m3fn.head", "bf16"]))
def test_any_split_and_order_gives_the_same_cache(order: list[tuple[int, int, int, int]], codec: str) -> None:
    manifest = small_manifest(codec, token_count=192)
    plan = kvblock.validate_manifest(manifest)
    packer = kvblock.codec(codec)
    rng = np.random.default_rng(0)
    whole = {key: packer.encode(rng.standard_normal((2, 192, 32)).astype(np.float32)) for key in plan.roles}
    coverage = kvblock.Coverage(plan, streams=2)
    writers = [kvblock.StreamWriter(plan, TICKET, EPOCH) for _ in range(2)]
    readers = [kvblock.StreamReader(plan, TICKET, EPOCH, coverage) for _ in range(2)]
    cache = {key: np.zeros_like(units) for key, units in whole.items()}
    for head, third, layer, role in order:
        part = whole[layer, role][head : head + 1, 2 * third : 2 * third + 2]
        [frame] = writers[head].frames(layer, role, part, token_start=32 + 64 * third, head_start=head)  # type: ignore[arg-type]
        header, payload = kvblock.decode_frame(frame)
        block = readers[head].validate(header.block, payload)
        heads = slice(block.head_start, block.head_start + block.head_count)
        groups = slice(block.group_start, block.group_start + block.group_count)
        cache[block.layer, block.role][heads, groups] = block.groups()
    for writer, reader in zip(writers, readers, strict=True):
        reader.finish(PushEnd(blocks=writer.sent))
    for key, units in whole.items():
        assert np.array_equal(cache[key], units)


def test_channel_orders_are_those_of_the_page() -> None:
    half = np.arange(8)
    interleaved = kvblock.channel_order(8, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    for j in range(4):  # half-split j is interleaved 2j, and j + D/2 is 2j + 1
        assert interleaved[2 * j] == half[j]
        assert interleaved[2 * j + 1] == half[j + 4]
    back = kvblock.channel_order(8, KV_ROPE_PAIRING_INTERLEAVED, KV_ROPE_PAIRING_HALF_SPLIT)
    assert np.array_equal(interleaved[back], half)
    assert np.array_equal(kvblock.channel_order(8, KV_ROPE_PAIRING_INTERLEAVED, KV_ROPE_PAIRING_INTERLEAVED), half)
    for wrong in ((7, KV_ROPE_PAIRING_HALF_SPLIT), (8, KV_ROPE_PAIRING_UNSPECIFIED)):
        with pytest.raises(ValueError, match="no order"):
            kvblock.channel_order(wrong[0], wrong[1], KV_ROPE_PAIRING_INTERLEAVED)


def _rotate(x: np.ndarray, interleaved: bool) -> np.ndarray:
    """RoPE of [tokens, D] by its definition in either order."""
    tokens, dim = x.shape
    angles = np.arange(tokens)[:, None] * 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, : dim // 2], x[:, dim // 2 :])
    turned = (first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles))
    return np.stack(turned, -1).reshape(tokens, dim) if interleaved else np.concatenate(turned, -1)


def test_an_interleaved_cache_is_read_by_permuting_the_queries() -> None:
    rng = np.random.default_rng(1)
    keys, queries, values = (rng.standard_normal((64, 32)) for _ in range(3))
    order = kvblock.channel_order(32, KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED)
    half_keys, half_queries = _rotate(keys, interleaved=False), _rotate(queries, interleaved=False)
    interleaved_keys = _rotate(keys[:, order], interleaved=True)  # as such a producer's weights give them
    assert np.allclose(half_keys[:, order], interleaved_keys)
    q, k, v = (torch.from_numpy(array).unsqueeze(0) for array in (half_queries[:, order], interleaved_keys, values))
    right = quant.reference_attention(torch.from_numpy(half_queries)[None], torch.from_numpy(half_keys)[None], v)
    torch.testing.assert_close(quant.reference_attention(q, k, v), right)


ACCEPTS = kvblock.Acceptance(
    model_fingerprint=FINGERPRINT,
    layers=3,
    kv_heads=0,
    head_dim=0,
    codecs=tuple(map(kvblock.codec, ("bf16", "tt_bfp8_b", "nvfp4"))),
    rope=ROPE,
    qk_norm=True,
    shapes={
        (0, KV_ROLE_K): (2, 64),
        (0, KV_ROLE_V): (2, 32),
        (1, KV_ROLE_K): (1, 128),
        (1, KV_ROLE_V): (1, 128),
        (2, KV_ROLE_K): (2, 64),
        (2, KV_ROLE_V): (2, 32),
    },
)


def mixed_manifest() -> kvblock.StreamPlan:
    wide = kvblock.LayerKv(2, 64, 32, kvblock.codec("tt_bfp8_b"), kvblock.codec("nvfp4"))
    exact = kvblock.LayerKv(1, 128, 128, kvblock.codec("bf16"), kvblock.codec("bf16"))
    manifest = kvblock.build_mixed_manifest(
        model_fingerprint=FINGERPRINT,
        layers=[wide, exact, wide],
        token_start=0,
        token_count=64,
        rope=ROPE,
        qk_norm=True,
    )
    assert [list(group.layers) for group in manifest.layer_groups] == [[0, 2], [1]]
    assert len(manifest.codecs) == 3
    return kvblock.validate_manifest(manifest)


def test_a_model_whose_layers_differ_is_streamed() -> None:
    plan = mixed_manifest()
    kvblock.check_plan(plan, ACCEPTS)
    rng = np.random.default_rng(2)
    writer, reader = kvblock.StreamWriter(plan, TICKET, EPOCH), kvblock.StreamReader(plan, TICKET, EPOCH)
    for (layer, role), role_plan in plan.roles.items():
        heads, head_dim = ACCEPTS.shapes[layer, role]  # type: ignore[index]
        assert (role_plan.kv_heads, role_plan.head_dim) == (heads, head_dim)
        values = rng.standard_normal((heads, 64, head_dim)).astype(np.float32)
        units = role_plan.codec.encode(values)
        [frame] = writer.frames(layer, role_plan.role, units, token_start=0)
        header, payload = kvblock.decode_frame(frame)
        block = reader.validate(header.block, payload)
        decoded = block.role_plan.codec.decode(block.payload, heads, 64, head_dim)
        assert np.abs(decoded - values).max() < 0.7
    assert reader.payload_bytes == plan.payload_bytes == 2 * 2 * 2 * (34 * 64 + 18 * 32 + 4) + 2 * 2 * 64 * 128
    reader.finish(PushEnd(blocks=writer.sent))


@pytest.mark.parametrize(
    ("shapes", "field"),
    [
        ({(1, KV_ROLE_V): (1, 64)}, "head_dim"),
        ({(0, KV_ROLE_K): (1, 64)}, "kv_heads"),
        ({(2, 9): (1, 64)}, "roles"),
    ],
)
def test_layers_that_differ_from_the_receivers_are_refused(
    shapes: dict[tuple[int, int], tuple[int, int]], field: str
) -> None:
    accepts = dataclasses.replace(ACCEPTS, shapes={**(ACCEPTS.shapes or {}), **shapes})
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(mixed_manifest(), accepts)
    assert refused.value.field == field
    missing = {key: shape for key, shape in (ACCEPTS.shapes or {}).items() if key != (1, KV_ROLE_V)}
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(mixed_manifest(), dataclasses.replace(ACCEPTS, shapes=missing))
    assert refused.value.field == "roles"


@pytest.mark.parametrize("role", [KV_ROLE_LATENT, KV_ROLE_STATE])
def test_reserved_roles_have_ids_and_are_refused_in_this_version(role: int) -> None:
    assert (KV_ROLE_LATENT, KV_ROLE_STATE) == (3, 4)
    manifest = small_manifest()
    manifest.layer_groups[0].roles[1].role = role  # type: ignore[assignment]
    with pytest.raises(errors.UnknownRole):
        kvblock.validate_manifest(manifest)


def test_a_receiver_may_read_both_channel_orders() -> None:
    manifest = small_manifest()
    manifest.rope.CopyFrom(KvRope(pairing=KV_ROPE_PAIRING_INTERLEAVED, theta=1e6))
    plan = kvblock.validate_manifest(manifest)
    accepts = dataclasses.replace(ACCEPTS, shapes=None, layers=2, kv_heads=2, head_dim=32)
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_plan(plan, accepts)
    assert refused.value.field == "rope.pairing"
    kvblock.check_plan(plan, dataclasses.replace(accepts, rope_pairings=(KV_ROPE_PAIRING_INTERLEAVED,)))
